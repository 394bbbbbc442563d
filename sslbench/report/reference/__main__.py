"""``python -m sslbench.report.reference FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from sslbench.config.registry import FILE_NAME, load_registry
from sslbench.plugin.catalog import Catalog
from sslbench.report.reference import pages, write

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")
    write(folder, pages(Catalog(), load_registry(Path(FILE_NAME))))
