"""Pages of what plugins import: hooks, contracts, blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sslbench.plugin.entry import EXTENSIONS, KINDS
from sslbench.report.reference.markdown import prose, table
from sslbench.report.reference.source import Member, Module, modules_of, read_module

CONTRACTS = (
    "sslbench.plugin.api",
    "sslbench.config.options",
    "sslbench.comm",
    "sslbench.errors",
    "sslbench.testing",
    "sslbench.deprecation",
)
BLOCKS = "sslbench.nn"
HOOKS = "sslbench.plugin.hooks"
_HOOKS = """# Hooks

A plugin module implements some of these, marked with `@hookimpl` and named by an entry point. A hook takes those
of its parameters that it wants, by name. [Plugins](../plugins.md) has examples.
"""
_CONTRACTS = """# Contracts

What a plugin subclasses, gets and calls. [Compatibility](../compatibility.md) says what of it stays as it is.
"""
_BLOCKS = """# Blocks

What methods are built from. [Compatibility](../compatibility.md) says what of it stays as it is.
"""


def hooks_page() -> str:
    """Every hook with its signature, when it is called, and the entry-point group it belongs to."""
    module = read_module(HOOKS)
    kinds = {f"sslbench_{kind}s": group for kind, group in KINDS.items()}
    parts = [_HOOKS]
    for title, wanted in (("Plugins", True), ("Observers and checks", False)):
        parts.append(f"## {title}\n")
        for hook in module.members:
            if (hook.name in kinds) == wanted:
                parts += [f"### `{hook.name}`\n", _code(hook.signature.removeprefix("@hookspec\n"))]
                parts += [f"{prose(hook.doc)}\n", f"Entry points: `{kinds.get(hook.name, EXTENSIONS)}`.\n"]
    return "\n".join(parts)


def contracts_page() -> str:
    """The contracts, module by module."""
    return _page(_CONTRACTS, CONTRACTS)


def blocks_page() -> str:
    """The blocks methods are built from, module by module."""
    return _page(_BLOCKS, modules_of(BLOCKS))


def _page(head: str, names: Sequence[str]) -> str:
    return "\n".join([head, *(line for name in names for line in _module(read_module(name)))])


def _module(module: Module) -> Iterator[str]:
    yield f"## `{module.name}`\n"
    yield f"{prose(module.doc)}\n"
    for member in module.members:
        yield f"### `{member.name}`\n"
        yield from _definition(member)
        for method in member.methods:
            yield f"#### `{member.name}.{method.name}`\n"
            yield from _definition(method)


def _definition(member: Member) -> Iterator[str]:
    yield _code(member.signature)
    if member.doc:
        yield f"{prose(member.doc)}\n"
    yield table(
        ("attribute", "type", "default", "meaning"),
        ((f"`{a.name}`", _quoted(a.type), _quoted(a.default), prose(a.doc)) for a in member.attributes),
    )


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _quoted(text: str) -> str:
    return f"`{text}`" if text else ""
