"""Writes the package of a new plugin from a template that is itself a package which runs."""

from __future__ import annotations

import ast
import builtins
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from sslbench import __version__
from sslbench.errors import ConfigError, write_failure
from sslbench.plugin.catalog import KINDS, Kind
from sslbench.plugin.entry import normalized

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_LONGEST = 24


@dataclass(frozen=True)
class Scaffold:
    """The package of one plugin.

    Args:
        kind: of the plugin.
        name: what users will type.

    Raises:
        ConfigError: a plugin cannot have this name.
    """

    kind: Kind
    name: str

    def __post_init__(self) -> None:
        _check_name(self.kind, self.name)

    @property
    def package(self) -> str:
        """Name of the distribution."""
        return f"sslbench-{self.name.replace('_', '-')}"

    @property
    def module(self) -> Path:
        """The plugin's source file, relative to the folder."""
        return Path("src", f"sslbench_{self._identifier}", f"{self.kind}.py")

    @property
    def _identifier(self) -> str:
        return self.name.replace("-", "_")

    @property
    def _template(self) -> Traversable:
        return files("sslbench") / "plugin-templates" / self.kind

    def write(self, folder: Path) -> list[Path]:
        """Write all files, or none.

        Args:
            folder: must not exist, or be empty.

        Returns:
            The files, relative to the folder.

        Raises:
            ConfigError: something is in the way, or the package would replace another one when it is installed.
        """
        self._check_distribution()
        folder = folder.expanduser().resolve()
        try:
            return self._write(folder)
        except OSError as error:
            reason = write_failure(error) or error.strerror or error
            raise ConfigError(
                f"nothing can be written to {folder}: {reason}", hint=f"{self._command} --out FOLDER"
            ) from error

    def commands(self) -> list[str]:
        """What to type in the folder: the first block of its README."""
        text = self._named((self._template / "README.md").read_text(encoding="utf-8"))
        return text.split("```sh\n", 1)[1].split("\n```", 1)[0].splitlines()

    @property
    def _command(self) -> str:
        return f"sslbench new-plugin {self.kind} {self.name}"

    def _check_distribution(self) -> None:
        """pip would replace an installed distribution of this name, which may hold another plugin."""
        from importlib.metadata import PackageNotFoundError, distribution

        try:
            points = distribution(self.package).entry_points
        except PackageNotFoundError:
            return
        if not points.select(group=KINDS[self.kind], name=self.name):
            raise ConfigError(
                f"the package of the {self.kind} '{self.name}' would be {self.package}, which is installed and is "
                "another plugin: pip would replace it",
                hint=f"take another name, such as: {self._other_name()}",
            )

    def _other_name(self) -> str:
        stem = self.name[: _LONGEST - len(self.kind) - 1].rstrip("-_")
        return f"sslbench new-plugin {self.kind} {stem}-{self.kind}"

    def _write(self, folder: Path) -> list[Path]:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError(
                f"{folder} exists already, and nothing is overwritten",
                hint=self._other_name() if self._is_namesake(folder) else f"{self._command} --out FOLDER",
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
            for tree in (self._template.parent / "common", self._template):  # type: ignore[attr-defined]
                self._fill(tree, Path(partial))
            folder.mkdir(exist_ok=True)
            for made in Path(partial).iterdir():
                made.replace(folder / made.name)
        return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())

    def _is_namesake(self, folder: Path) -> bool:
        """Whether a folder holds a distribution of this name, beside which this one could not be installed."""
        try:
            text = (folder / "pyproject.toml").read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        found = re.search(r'^name\s*=\s*["\']([^"\']+)', text, re.MULTILINE)
        return found is not None and normalized(found[1]) == self.package

    def _fill(self, template: Traversable, target: Path) -> None:
        """Copy a file or a tree, with the plugin's names."""
        if template.is_file():
            target.write_text(self._named(template.read_text(encoding="utf-8")), encoding="utf-8")
            return
        target.mkdir(exist_ok=True)
        for child in template.iterdir():
            if not child.name.startswith((".", "__pycache__")):  # what tools leave behind
                # A file that is to be hidden would mean something where the templates are.
                self._fill(child, target / re.sub("^dot-", ".", self._named(child.name)))

    def _named(self, text: str) -> str:
        """With the plugin's names for the template's, which are names so that templates are code that runs."""
        return re.sub("|".join(self._names), lambda found: self._names[found[0]], text)

    @cached_property
    def _names(self) -> dict[str, str]:
        return {
            "sslbench>=0": f"sslbench>={__version__}",
            "sslbench-plugin-template": self.package,
            "plugin-template": self.name,
            "plugin_template": self._identifier,
            "PluginTemplate": self._class_name(),
        }

    def _class_name(self) -> str:
        """The name in capitals, with the kind behind it where the template or Python mean something by it."""
        plain = "".join(word.capitalize() for word in re.split("[-_]", self.name))
        source = self._template / "src" / "sslbench_plugin_template" / f"{self.kind}.py"
        tree = ast.parse(source.read_text(encoding="utf-8"))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | set(dir(builtins))
        clashes = {plain, f"{plain}Options"} & used
        return f"{plain}{self.kind.capitalize()}" if clashes else plain


def _check_name(kind: Kind, name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise ConfigError(
            f"no plugin can be named '{name}': a name is small letters and digits, starts with a letter, has its "
            f"words joined by - or _, and at most {_LONGEST} characters",
            hint=f"sslbench new-plugin {kind} {_nearest_name(name)}",
        )
    if kind == "eval" and re.match("test([-_]|$)", name):
        raise ConfigError(
            f"a protocol named '{name}' may not choose anything, because it may open the test split",
            hint=f"name the one that chooses, and test_NAME comes with it: "
            f"sslbench new-plugin eval {_nearest_name(name.removeprefix('test'))}",
        )


def _nearest_name(name: str) -> str:
    words = "-".join(re.findall("[a-z0-9]+", name.lower()))
    return words.lstrip("-0123456789")[:_LONGEST].rstrip("-") or "NAME"
