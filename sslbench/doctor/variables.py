"""The environment variables of sslbench, and those that look as if they were."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from sslbench.doctor.finding import Check
from sslbench.errors import did_you_mean
from sslbench.launch.environment import FOLDER, LAUNCH, LAUNCHER, OPTIONS, RESTARTS

VARIABLES = {
    "SSLBENCH_DEBUG": "unexpected errors come with a traceback",
    "SSLBENCH_PEER_TIMEOUT": "seconds to wait for another process, like --peer-timeout",
    "SSLBENCH_PLUGINS": "only these packages or plugins are loaded, beside the built-in ones and -p FILE",
    "SSLBENCH_REGISTRY": "the registry file, like --registry",
    "SSLBENCH_RUNS": "folder of the run directories, like --runs",
    "SSLBENCH_TRACE": "hook calls are shown on stderr",
}
"""Name -> effect of those that users set."""
_INTERNAL = frozenset({FOLDER, LAUNCH, LAUNCHER, OPTIONS, RESTARTS, "SSLBENCH_TEST_DATA"})


def variables(environ: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Those that are set, with what they do."""
    for name in sorted(name for name in environ if name.startswith("SSLBENCH_")):
        if name in VARIABLES:
            yield Check("variables", name, "ok", f"{environ[name]!r}: {VARIABLES[name]}")
        elif name not in _INTERNAL:
            guess = did_you_mean(name, VARIABLES)
            yield Check("variables", name, "warning", f"nothing reads it{guess}", f"unset {name}")
