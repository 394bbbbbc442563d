"""Packages of new plugins as their users get them: wheels, in an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

import sslbench
from sslbench.plugin.catalog import KINDS, Kind
from sslbench.plugin.scaffold import Scaffold

NAME = "red-panda"
SHORT = ("train.epochs=2", "train.batch_size=64", "probe.every=0", "--no-evals", "run.name=first")
PRETRAIN: dict[Kind, Sequence[str]] = {
    "method": ("--method", NAME, "--dataset", "digits"),
    "dataset": ("--method", "simclr", "--dataset", NAME, "dataset.root=images", "train.batch_size=4"),
    "backbone": ("--method", "simclr", "--backbone", NAME, "--dataset", "digits"),
    "eval": ("--method", "simclr", "--dataset", "digits"),
}
EVALUATE: dict[Kind, Sequence[Sequence[str]]] = {
    "method": (("knn", "first"),),
    "dataset": (("knn", "first", "k=3"),),
    "backbone": (("knn", "first"),),
    "eval": ((NAME, "first", "layer=stem"), (f"test_{NAME}", "first")),
}


class Environment:
    """A virtual environment that has what this one has, and a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir()
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        bases = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
        site_packages = Path(sysconfig.get_path("purelib", "venv", vars=bases))
        shared = [*map(str, _site_packages()), str(Path(sslbench.__file__).parents[1])]
        lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(shared)]
        (site_packages / "outer.pth").write_text("\n".join(lines) + "\n")

    def run(self, *arguments: str | Path, cwd: Path | None = None, python: Path | None = None) -> str:
        own = {"MLFLOW_TRACKING_URI": f"sqlite:///{self.work}/mlflow.db", "COLUMNS": "200"}
        done = subprocess.run(
            [str(python or self.python), *map(str, arguments)],
            cwd=cwd or self.work,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, package: Path) -> None:
        """Build the wheel with this environment's tools, and install it without looking for anything else."""
        here = Path(sys.executable)
        self.run("-m", "build", "--wheel", "--no-isolation", package, python=here)
        (wheel,) = (package / "dist").glob("*.whl")
        self.run(
            *("-m", "pip", "--python", self.python, "install", "--quiet", "--no-index", "--no-deps", wheel),
            python=here,
        )

    def sslbench(self, *arguments: str) -> str:
        return self.run("-m", "sslbench", *arguments)


def _site_packages() -> list[Path]:
    """Where this environment's packages lie; some may be where a .pth file leads."""
    named = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return [path for path in named if path.is_dir()]


def _write_images(root: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, label in (("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")):
        (root / split / label).mkdir(parents=True)
        for number in range(12):
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / split / label / f"{number}.png")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("build") is None or find_spec("pip") is None, reason="needs build and pip")
@pytest.mark.parametrize("kind", KINDS)
def test_the_wheel_of_a_new_plugin_works_where_it_is_installed(kind: Kind, tmp_path: Path) -> None:
    if kind == "backbone":
        pytest.importorskip("timm")
    package = tmp_path / "package"
    Scaffold(kind, NAME).write(package)
    environment = Environment(tmp_path)
    environment.install(package)
    _write_images(environment.work / "images")

    listed = environment.sslbench("list", f"{kind}s")
    assert any(NAME in line and "sslbench-red-panda 0.1.0" in line for line in listed.splitlines()), listed
    assert "sslbench-red-panda 0.1.0" in environment.sslbench("info", kind, NAME)
    environment.sslbench("pretrain", *PRETRAIN[kind], *_but(SHORT, PRETRAIN[kind]))
    for words in EVALUATE[kind]:
        assert "top1" in environment.sslbench("eval", *words)
    root = [f"root={environment.work / 'images'}"] if kind == "dataset" else []
    assert "held" in environment.sslbench("check", kind, NAME, *root, "--quick")
    environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=package)


def _but(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """Options that ``others`` do not set."""
    keys = {word.partition("=")[0] for word in others if "=" in word}
    return [word for word in words if word.partition("=")[0] not in keys]


@pytest.mark.slow
def test_new_packages_are_typed(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = tmp_path / kind
        Scaffold(kind, NAME).write(folder)
        found = subprocess.run(
            [sys.executable, "-m", "mypy"],
            cwd=folder,
            env={**os.environ, "MYPYPATH": str(Path(sslbench.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stdout + found.stderr
