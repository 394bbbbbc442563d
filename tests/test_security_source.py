"""No line of the source may read a foreign file in a way that runs code or unpacks it anywhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    file for folder in ("sslbench", "plugins", "benchmarks") for file in (ROOT / folder).rglob("*.py")
)
#: Reading with one of these runs code that a file names, or writes where an archive says.
NEVER = re.compile(
    r"""(?x) ^(
      (c?pickle|_pickle|dill|cloudpickle|marshal|jsonpickle) \. (load|loads|Unpickler)
    | joblib\.load | shelve\.open | (pd|pandas)\.read_pickle
    | yaml\.(load|load_all|full_load|unsafe_load|unsafe_load_all|full_load_all|UnsafeLoader|FullLoader|Loader)
    | os\.(system|popen) | shutil\.unpack_archive | (.*\.)?extractall
    )$"""
)
#: Where one is right, and why.
ALLOWED = {
    ("sslbench/tracking/process.py", "pickle.load"): "a pipe between two of our own processes",
    ("sslbench/testing/datasets.py", "pickle.loads"): "reads what the same line has written",
    ("sslbench/data/cifar.py", "pickle.Unpickler"): "accepts four names that hold data",
    ("sslbench/config/tree.py", "yaml.load"): "with the safe loader of libyaml",
}
REQUIRED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def name_of(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute; of other expressions ``.c`` alone."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield name_of(node.func), node


def findings(file: Path) -> list[str]:
    """What a file must not do, with line numbers."""
    place = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        name = name_of(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if NEVER.match(name) and (place, name) not in ALLOWED:
            found.append(f"{place}:{node.lineno}: {name}")
    for name, call in calls(file):
        if name in ("eval", "exec", "compile"):
            found.append(f"{place}:{call.lineno}: {name}")
        wanted = REQUIRED.get(name.replace("numpy.", "np."))
        if wanted and not has_keyword(call, *wanted):
            found.append(f"{place}:{call.lineno}: {name} without {wanted[0]}={wanted[1]}")
        if has_keyword(call, "shell", True) or has_keyword(call, "weights_only", False):
            found.append(f"{place}:{call.lineno}: {name} with a shell, or with more than weights")
    return found


def has_keyword(call: ast.Call, name: str, value: bool) -> bool:
    return any(
        word.arg == name and isinstance(word.value, ast.Constant) and word.value.value is value
        for word in call.keywords
    )


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_source_reads_foreign_files_safely(file: Path) -> None:
    assert findings(file) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "numpy.load(f)",
        "np.load(f, allow_pickle=True)",
        "pickle.loads(b)",
        "yaml.load(t, Loader=yaml.Loader)",
        "tarfile.open(f).extractall(x)",
        "shutil.unpack_archive(f)",
        "eval(t)",
        "subprocess.run(t, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(line)
    assert findings(file)


def test_what_is_allowed_is_still_there() -> None:
    for place, name in ALLOWED:
        names = {name_of(node) for node in ast.walk(ast.parse((ROOT / place).read_text()))}
        assert name in names, f"{place} no longer has {name}: drop the exception"


def test_mlflow_is_shown_on_localhost_only() -> None:
    texts = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile", *SOURCES]
    for file in texts:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            hosts = re.findall(r"mlflow (?:ui|server)\b[^`]*--host[ =]+([\w.:]+)", line)
            assert set(hosts) <= {"127.0.0.1", "localhost"}, f"{file}:{number}: {line}"
