"""The public names of a module with their documentation, read from its source and not by importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import sslbench

_ROOT = Path(sslbench.__file__).parents[1]
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Documented = ast.ClassDef | _Function


@dataclass(frozen=True)
class Attribute:
    """A field of a class, with the string below it."""

    name: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True)
class Member:
    """A function, a method or a class."""

    name: str
    signature: str
    """As it is written, decorators that change how it is used included."""
    doc: str
    attributes: tuple[Attribute, ...] = ()
    methods: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Module:
    """A module and what it offers, in the order of its source."""

    name: str
    doc: str
    members: tuple[Member, ...]


def read_module(name: str) -> Module:
    """A module with what ``__all__`` lists, names it has from elsewhere included; else what has no underscore."""
    tree = _parsed(name)
    listed = _listed(tree)
    own = {node.name: node for node in tree.body if isinstance(node, _Documented)}
    public = [n for n in own if n in listed] if listed else [n for n in own if not n.startswith("_")]
    foreign = [name for name in listed if name not in own]
    nodes = [own[name] for name in public] + [node for name in foreign for node in _imported(tree, name)]
    return Module(name, ast.get_docstring(tree) or "", tuple(_member(node) for node in nodes))


def modules_of(package: str) -> list[str]:
    """The modules of a package, by name."""
    folder = _ROOT.joinpath(*package.split("."))
    return [f"{package}.{file.stem}" for file in sorted(folder.glob("[!_]*.py"))]


@cache
def _parsed(name: str) -> ast.Module:
    stem = _ROOT.joinpath(*name.split("."))
    file = stem.with_suffix(".py") if stem.with_suffix(".py").is_file() else stem / "__init__.py"
    return ast.parse(file.read_text(encoding="utf-8"))


def _listed(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def _imported(tree: ast.Module, name: str) -> Iterator[_Documented]:
    """The definition of a name that the module has from another one of ours."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names] and node.module:
            yield from (n for n in _parsed(node.module).body if isinstance(n, _Documented) and n.name == name)


def _member(node: _Documented) -> Member:
    doc = ast.get_docstring(node) or ""
    if not isinstance(node, ast.ClassDef):
        return Member(node.name, _signature(node), doc)
    methods = [n for n in node.body if isinstance(n, _Function) and _is_public(n)]
    bases = ", ".join(map(ast.unparse, [*node.bases, *(keyword.value for keyword in node.keywords)]))
    marks = "".join(f"@{mark}\n" for mark in map(ast.unparse, node.decorator_list) if mark.startswith("dataclass"))
    return Member(
        node.name,
        f"{marks}class {node.name}({bases})" if bases else f"{marks}class {node.name}",
        doc,
        tuple(_attributes(node)),
        tuple(_member(method) for method in methods),
    )


def _is_public(method: _Function) -> bool:
    """Constructors count if they take anything."""
    if method.name == "__init__":
        return len(method.args.args) > 1 or bool(method.args.kwonlyargs)
    return not method.name.startswith("_") and not any(
        "validator" in ast.unparse(d) for d in method.decorator_list
    )


def _signature(node: _Function) -> str:
    telling = ("abstractmethod", "classmethod", "contextmanager", "property", "staticmethod", "hookspec")
    marks = [ast.unparse(decorator) for decorator in node.decorator_list]
    lines = [f"@{mark}\n" for mark in marks if mark in telling]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return "".join([*lines, f"def {node.name}({ast.unparse(node.args)}){returns}"])


def _attributes(node: ast.ClassDef) -> Iterator[Attribute]:
    following = [*node.body[1:], None]
    for statement, after in zip(node.body, following, strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name, annotation, value = statement.target.id, ast.unparse(statement.annotation), statement.value
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name, annotation, value = statement.targets[0].id, "", statement.value
        else:
            continue
        if not name.startswith("_") and name != "model_config":
            yield Attribute(name, annotation, ast.unparse(value) if value else "", _string(after))


def _string(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return str(statement.value.value)
    return ""
