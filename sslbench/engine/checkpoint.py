"""Checkpoints: written whole or not at all, verified when read, loadable without sslbench.

``checkpoints/step-00001234/`` holds

* ``state.pt``: method (weights, teachers, queues), optimiser and step; loads at any world size. Imported weights
  have none.
* ``backbone.pt``: the exported backbone's plain state dict, no prefixes.
* ``meta.json``: :class:`CheckpointMeta`, with the SHA-256 of both files and of what it says itself.

All files are read with ``weights_only``. One file for the state, rather than torch.distributed.checkpoint's
folder, because that format's index is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sslbench.config.options import Options
from sslbench.config.validate import validate_section
from sslbench.errors import CheckpointError, write_failure
from sslbench.launch.environment import launch_words
from sslbench.plugin.api import Backbone
from sslbench.plugin.catalog import Catalog
from sslbench.untrusted import read_whole

STATE, BACKBONE, META, LATEST = "state.pt", "backbone.pt", "meta.json", "LATEST"
FOLDER = "checkpoints"
_LATEST_LETTERS = 200
"""What is read of LATEST: it holds one name."""


class BackboneMeta(BaseModel):
    """How to build the backbone again."""

    name: str
    options: dict[str, Any]
    image_size: int = Field(ge=1, le=16_384)
    """Side in pixels of the largest view it was trained with; the default side for evaluations."""
    dim: int
    stride: int


class CheckpointMeta(BaseModel):
    """What a checkpoint is. Unknown keys of later versions are ignored."""

    model_config = ConfigDict(extra="ignore")

    format: int = 1
    step: int
    epoch: int
    method: str
    uses_labels: bool
    limited: bool
    seed: int
    backbone: BackboneMeta
    dataset: str
    dataset_fingerprint: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    config_hash: str
    plugins: list[dict[str, str]]
    sslbench: str
    sha256: dict[str, str] = {}


def save(
    run_dir: Path, meta: CheckpointMeta, backbone: Mapping[str, Any], state: Mapping[str, Any] | None
) -> Path:
    """Write a checkpoint and make it the latest one.

    Args:
        state: what training continues from; None: there is nothing to continue.

    Returns:
        Its folder.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = run_dir / FOLDER / f"step-{meta.step:08d}"
    partial = final.with_name(final.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        digests = {BACKBONE: _write_tensors(partial / BACKBONE, backbone)}
        if state is not None:
            digests[STATE] = _write_tensors(partial / STATE, state)
        content = meta.model_dump(mode="json") | {"sha256": digests}
        signed = content | {"sha256": digests | {META: _digest_of(content)}}
        _write_text(partial / META, json.dumps(signed, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(final.parent)
        _point_latest(final)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _write_failure(final, error) from error
    return final


def sha256_of(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(path.parent for path in (run_dir / FOLDER).glob(f"step-????????/{META}"))


def latest(
    run_dir: Path,
    log: Callable[[str], None],
    needs: Collection[str] = (BACKBONE, STATE),
    *,
    before: int | None = None,
) -> Path:
    """The newest intact checkpoint; damaged ones are named in the log and passed over.

    Args:
        needs: files that must be intact; others may be damaged.
        before: only those of fewer steps.

    Raises:
        CheckpointError: there is none.
    """
    damaged = 0
    for candidate in _candidates(run_dir, log):
        if before is not None and step_of(candidate) >= before:
            continue
        try:
            _verify(candidate, read_meta(candidate, verify=False).sha256, needs)
        except CheckpointError as error:
            log(f"{error.message}; looking for one before it")
            damaged += 1
            continue
        return candidate
    found = f"; {damaged} damaged" if damaged else ""
    raise CheckpointError(
        f"{run_dir} has no intact checkpoint{found}", hint="start the run again with sslbench pretrain"
    )


def _candidates(run_dir: Path, log: Callable[[str], None]) -> Iterator[Path]:
    """The one that LATEST names and those before it, newest first; all of them if it names none."""
    pointer = run_dir / FOLDER / LATEST
    pointed, existing = _pointed(run_dir), list_checkpoints(run_dir)
    if pointed is not None and (pointed / META).is_file():
        yield pointed
        yield from (c for c in reversed(existing) if c.name < pointed.name)
        return
    if pointed is not None:
        log(f"checkpoint {pointed}, named by {LATEST}, is not there or has no {META}; looking for another one")
    elif pointer.exists():
        log(f"{pointer} is damaged; looking for the newest checkpoint")
    elif existing:
        log(f"{pointer} is missing; looking for the newest checkpoint")
    yield from reversed(existing)


def read_meta(path: Path, *, verify: bool) -> CheckpointMeta:
    """The meta data of a checkpoint folder.

    Args:
        verify: also compare the SHA-256 of its files.

    Raises:
        CheckpointError: missing, unreadable or damaged.
    """
    try:
        meta = _parsed(read_whole(path / META).decode())
    except ValidationError as error:
        found = f"{META} is damaged or foreign ({error.error_count()} entries missing or wrong)"
        raise CheckpointError(f"checkpoint {path} cannot be read: {found}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({META}): {_first_line(error)}") from error
    if verify:
        _verify(path, meta.sha256, {BACKBONE, *meta.sha256})
    return meta


def _parsed(text: str) -> CheckpointMeta:
    meta = CheckpointMeta.model_validate_json(text)
    digest = meta.sha256.pop(META, None)  # earlier versions wrote none
    content = json.loads(text)
    content["sha256"].pop(META, None)
    if digest not in (None, _digest_of(content)):
        raise ValueError("it does not match its own SHA-256")
    return meta


def _digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of what meta.json says, whatever version says it and however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _verify(path: Path, digests: Mapping[str, str], needs: Collection[str]) -> None:
    for name in needs:
        file = path / name
        if name not in digests:
            raise CheckpointError(f"checkpoint {path} is damaged: {META} lists no SHA-256 of {name}")
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        if sha256_of(file) != digests[name]:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} does not match its SHA-256")


def load_tensors(file: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a file of tensors and plain values on the CPU; no code in it is ever executed.

    Args:
        mapped: leave the tensors on disk until they are looked at, in memory that the system can take back.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols of foreign files
            if zipfile.is_zipfile(file):
                _check_stored(file)
            else:
                mapped = False  # other formats are read, and refused, without mapping
            return cast("dict[str, Any]", torch.load(file, map_location="cpu", weights_only=True, mmap=mapped))
    except pickle.UnpicklingError as error:  # torch would advise to load it without this protection
        raise CheckpointError(
            f"{file} cannot be read: it is damaged, or holds more than tensors and plain values and could run code"
        ) from error
    except CheckpointError:
        raise
    # A damaged archive makes torch raise nearly anything.
    except Exception as error:
        raise CheckpointError(f"{file} cannot be loaded: {_first_line(error)}") from error


def _check_stored(file: Path) -> None:
    """torch never compresses: a compressed file could unpack to a thousand times its size."""
    with zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise CheckpointError(f"{file} is refused: its tensors are compressed, which torch.save does not do")


def load_backbone(path: Path, catalog: Catalog) -> tuple[Backbone, CheckpointMeta]:
    """Build the backbone of a checkpoint and load its weights strictly.

    Raises:
        CheckpointError: damaged, or the weights do not fit the backbone.
        PluginError: its backbone plugin is not installed here.
    """
    meta = read_meta(path, verify=False)
    _verify(path, meta.sha256, [BACKBONE])
    cls = catalog.load("backbone", meta.backbone.name)
    cfg: Options = validate_section(cls.Config, meta.backbone.options, "backbone", str(path / META))
    backbone: Backbone = cls(cls.without_weights(cfg), meta.backbone.image_size)
    weights = load_tensors(path / BACKBONE)
    try:
        backbone.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path / BACKBONE} does not fit backbone '{meta.backbone.name}': {details(error)}"
        ) from error
    return backbone, meta


def start_of(run_dir: Path) -> str:
    """The digest of the weights that another run would start from; it is recorded as ``sslbench.start``."""
    path = latest(run_dir, lambda message: None, [BACKBONE])
    return read_meta(path, verify=False).sha256[BACKBONE]


def step_of(path: Path) -> int:
    """How many steps had been done, by the name of its folder."""
    return int(path.name.removeprefix("step-"))


def good_before(run_dir: Path, diverged_at: int) -> list[Path]:
    """Checkpoints of a diverged run from which at least one step gave a finite loss, oldest first."""
    return [path for path in list_checkpoints(run_dir) if step_of(path) < diverged_at - 1]


def epoch_of(path: Path) -> int | None:
    """After which epoch a checkpoint was made; None if it cannot be read."""
    try:
        return read_meta(path, verify=False).epoch
    except CheckpointError:
        return None


def _write_tensors(file: Path, content: Mapping[str, Any]) -> str:
    with file.open("wb") as stream:
        torch.save(dict(content), stream)
        stream.flush()
        os.fsync(stream.fileno())
    return sha256_of(file)


def _write_text(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point_latest(path: Path) -> None:
    pointer = path.parent / LATEST
    fresh = pointer.with_suffix(".partial")
    _write_text(fresh, json.dumps(path.name))
    os.replace(fresh, pointer)


def _pointed(run_dir: Path) -> Path | None:
    """None if LATEST is missing or holds anything but the name of a checkpoint."""
    try:
        with (run_dir / FOLDER / LATEST).open(encoding="utf-8") as file:
            name = json.loads(file.read(_LATEST_LETTERS))
    except (OSError, ValueError, RecursionError):
        return None
    return run_dir / FOLDER / name if re.fullmatch(r"step-\d{8,}", str(name)) else None


def _write_failure(path: Path, error: BaseException) -> CheckpointError:
    reason = write_failure(error, path) or _first_line(error)
    again = f"sslbench pretrain --resume {shlex.quote(str(path.parent.parent))}{launch_words()}"
    return CheckpointError(
        f"checkpoint {path} could not be written: {reason}; earlier checkpoints are untouched",
        hint=f"free some space, then: {again}",
    )


def details(error: BaseException) -> str:
    """What load_state_dict found, without its heading; the first findings will do."""
    if isinstance(error, KeyError):
        return f"it has no entry {error}"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[1:3] or lines)[:400]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
