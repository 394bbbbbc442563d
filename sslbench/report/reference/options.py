"""The page of all options of the core."""

from __future__ import annotations

import inspect

from pydantic import BaseModel

from sslbench.config.schema import CoreOptions
from sslbench.plugin.viewspec import ViewSpec
from sslbench.report.describe import nested_models
from sslbench.report.reference.markdown import option_table

_OPTIONS = """# Options

Options of the core, by section. Write them as `section.key=value` on a command line or as nested keys in a
configuration file; [configuration](../configuration.md) says how layers combine. Those of methods, data sets,
backbones and protocols are on the pages of the [plugins](plugins.md).

° cannot change the pretrained weights: the key stays out of the configuration hash and may differ on `--resume`.
"""
_VIEWS = """## Views

Every method has the option `method.views`, a list of `ViewSpec`. Address an item by its number, such as
`method.views.0.gray=0.1`. Steps run in the order of the fields, `count` and `size` aside.
"""


def options_page() -> str:
    """Markdown of all core sections and of view specs."""
    parts = [_OPTIONS]
    for section, default in CoreOptions():
        model: type[BaseModel] = type(default)
        parts += [f"## {section}\n", f"{inspect.getdoc(model)}\n", option_table(model, f"{section}.")]
    parts.append(_VIEWS)
    views: list[type[BaseModel]] = [ViewSpec, *nested_models(ViewSpec)]
    for part in views:
        parts += [f"### {part.__name__}\n", f"{inspect.getdoc(part)}\n", option_table(part)]
    return "\n".join(parts)
