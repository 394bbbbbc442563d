"""Rules on the files of a data set, tried on a copy: moved, changed, damaged, missing."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sslbench.errors import ConfigError, DataError, SslbenchError
from sslbench.plugin.api import Dataset, Options, Source
from sslbench.testing.dataset import DatasetSubject, contents, image_digests
from sslbench.testing.elsewhere import Elsewhere, changed, moved, named_folders
from sslbench.testing.rules import BrokenRuleError, NotTriedError, Rule

SHARES = (0.25, 0.5, 0.75, 0.98)
"""Where in a file a bit is turned."""
MOST_TRIES = 24
PATIENCE = 30.0
"""Seconds after which reading an image counts as hanging."""


@contextmanager
def _elsewhere(subject: DatasetSubject) -> Iterator[Elsewhere]:
    with tempfile.TemporaryDirectory() as name:
        yield Elsewhere.copy(subject.cfg, Path(name).resolve())


class _State(NamedTuple):
    """What a data set looks like, or that it was refused."""

    contents: Any
    fingerprint: str
    revision: list[str | None]


def _state(subject: DatasetSubject, cfg: Options) -> _State | None:
    """None: refused with a DataError."""
    try:
        dataset = subject.open(cfg)
        revision = [dataset.split(split).revision() for split in dataset.info.splits]
        return _State(contents(dataset, subject.images), dataset.fingerprint(), revision)
    except DataError:
        return None


def _moves(subject: DatasetSubject) -> str:
    with _elsewhere(subject) as copy:
        found = _state(subject, copy.options)
    if found is None or found.contents != contents(subject.dataset, subject.images):
        raise BrokenRuleError(
            "a copy of its folder is another data set", "derive nothing from where the folder is"
        )
    if found.fingerprint != subject.dataset.fingerprint():
        raise BrokenRuleError(
            "a copy of its folder has another fingerprint",
            "leave out dates and the path of the root; take names relative to it",
        )
    return "the same in another folder"


def _covers(subject: DatasetSubject) -> str:
    """Whatever changes an image or a target changes the fingerprint, and the revision where there is one."""
    with _elsewhere(subject) as copy:
        before = _state(subject, copy.options)
        if before is None:
            raise NotTriedError("a copy of its folder cannot be opened")
        tried = [_tried(subject, copy, before, edit) for edit in _edits(subject, copy)]
    images, targets = (sum(kinds) for kinds in zip(*tried, strict=True))
    if not images:
        raise NotTriedError("no changed bit of its files changed an image")
    return f"changed with {images} changes of images and {targets} of targets"


def _tried(subject: DatasetSubject, copy: Elsewhere, before: _State, edit: dict[Path, bytes]) -> tuple[bool, bool]:
    """Whether an edit changed images, and whether it changed targets."""
    names = ", ".join(path.name for path in edit)
    with changed(edit):
        after = _state(subject, copy.options)
    if after is None:
        return False, False
    images = _part(after, 1) != _part(before, 1)
    targets = _part(after, 0) != _part(before, 0)
    if (images or targets) and after.fingerprint == before.fingerprint:
        raise BrokenRuleError(
            f"{'images' if images else 'targets'} changed with {names}, the fingerprint did not",
            "hash the contents of all files and the targets, in the order of the data set",
        )
    if images and None not in before.revision and after.revision == before.revision:
        raise BrokenRuleError(
            f"images changed with {names}, revision() did not", "take sizes and dates of all files, or return None"
        )
    return images, targets


def _part(state: _State, number: int) -> dict[str, Any]:
    return {split: found[number] for split, found in state.contents.items()}


def _edits(subject: DatasetSubject, copy: Elsewhere) -> list[dict[Path, bytes]]:
    """Single bits turned in some files, and two images exchanged."""
    dataset = subject.open(copy.options)
    images = {file for split in dataset.info.splits for file in _image_files(dataset.split(split), copy)}
    others = [file for file in copy.files if file not in images]
    # The middle of a small JPEG is a table that no pixel may need.
    edits = [_flipped(file, share) for file in _some(sorted(images), 3) for share in SHARES[1:]]
    edits += [_flipped(file, share) for file in _some(others, 6) for share in SHARES]
    return [edit for edit in (*_exchanged(dataset, copy), *edits) if edit][:MOST_TRIES]


def _some(files: list[Path], count: int) -> list[Path]:
    return files[:: max(1, len(files) // count)][:count]


def _flipped(file: Path, share: float) -> dict[Path, bytes]:
    """One bit, among the bytes that are not zero: archives are padded with zeros that nobody reads."""
    content = np.fromfile(file, np.uint8)
    used = np.flatnonzero(content)
    if not len(used):
        return {}
    content[used[int(share * (len(used) - 1))]] ^= 1
    return {file: content.tobytes()}


def _exchanged(dataset: Dataset, copy: Elsewhere) -> Iterator[dict[Path, bytes]]:
    """Two images of different classes: the same contents, but other targets."""
    source = dataset.split(dataset.info.pretrain_split)
    targets = source.targets
    if targets is None:
        return
    other = next((n for n in range(len(source)) if not bool((targets[n] == targets[0]).all())), None)
    first, second = (copy.file_in(source.describe(n)) if n is not None else None for n in (0, other))
    if first and second and first != second:
        yield {first: second.read_bytes(), second: first.read_bytes()}


def _image_files(source: Source, copy: Elsewhere) -> Iterator[Path]:
    found = (copy.file_in(source.describe(number)) for number in range(len(source)))
    return (file for file in found if file)


def _damaged(subject: DatasetSubject) -> str:
    """A damaged image is an error that names it, and does no harm to others."""
    with _elsewhere(subject) as copy:
        dataset = subject.open(copy.options)
        split = dataset.info.pretrain_split
        number = len(dataset.split(split)) // 2
        file = copy.file_in(dataset.split(split).describe(number))
        if file is None:
            return _damaged_archive(subject, copy)
        for kind, content in _damages(file):
            with changed({file: content}):
                _check_damaged(subject, copy.options, split, number, file, f"{kind} image")
    return "truncated, empty, and something else"


def _damages(file: Path) -> Iterator[tuple[str, bytes]]:
    content = file.read_bytes()
    yield "a truncated", content[: len(content) // 2]
    yield "an empty", b""
    yield "no real", bytes(range(256)) * (len(content) // 256 + 1)


def _check_damaged(
    subject: DatasetSubject, options: Options, split: str, number: int, file: Path, what: str
) -> None:
    hint = "decode with sslbench.data.imagefile.decode_image, or raise DataError(f'{path} cannot be decoded: ...')"
    try:
        source = subject.open(options).split(split)
        _in_time(lambda: source.image(number), what)
    except DataError as error:
        if file.name not in error.message:
            raise BrokenRuleError(f"{what} is an error that does not name it: {error.message}", hint) from error
    except BrokenRuleError:
        raise
    except Exception as error:
        raise BrokenRuleError(f"{what} is {type(error).__name__}: {error}", hint) from error
    else:
        _check_others(source, number, what)
        raise BrokenRuleError(f"{what} is shown as if it were a whole one", hint)


def _check_others(source: Source, number: int, what: str) -> None:
    other = (number + 1) % len(source)
    if other != number and image_digests(source, [other]) == image_digests(source, [number]):
        raise BrokenRuleError(f"{what} is replaced by another", "raise DataError: data.max_unreadable replaces it")


def _damaged_archive(subject: DatasetSubject, copy: Elsewhere) -> str:
    file = max(copy.files, key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    for kind, damaged in (("half of", content[: len(content) // 2]), ("nothing of", b"")):
        with changed({file: damaged}):
            _check_refused(subject, copy.options, f"{kind} {file.name} is left")
    return f"of {file.name}"


def _check_refused(subject: DatasetSubject, options: Options, when: str) -> None:
    hint = "compare sizes and counts when files are opened, and raise DataError naming the file"

    def read_all() -> None:
        dataset = subject.open(options)
        for split in dataset.info.splits:
            source = dataset.split(split)
            for number in range(len(source)):
                source.image(number)

    try:
        _in_time(read_all, when)
    except DataError:
        return
    except BrokenRuleError:
        raise
    except Exception as error:
        raise BrokenRuleError(f"{when}: {type(error).__name__}: {error}", hint) from error
    raise BrokenRuleError(f"{when}, and every image can be read", hint)


def _in_time(work: Callable[[], Any], what: str) -> None:
    """Do it in a thread, which is left behind if it hangs."""
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise BrokenRuleError(
            f"{what}: no answer within {PATIENCE:g} s", "raise DataError instead of trying again"
        )
    if failures:
        raise failures[0]


def _missing(subject: DatasetSubject) -> str:
    folders = named_folders(subject.cfg)
    words = {word for folder in folders for word in _layout(folder)}
    with tempfile.TemporaryDirectory() as name:
        empty, absent = Path(name, "empty"), Path(name, "absent")
        empty.mkdir()
        told = _refusal(subject, moved(subject.cfg, dict.fromkeys(folders, empty)), "an empty folder")
        _refusal(subject, moved(subject.cfg, dict.fromkeys(folders, absent)), "a folder that is not there")
    if not any(word in told for word in words):
        raise BrokenRuleError(
            f"an empty folder is an error that does not tell what is expected: {told}",
            "name the layout: raise DataError(f'... expected layout: {root}/train/CLASS/*.jpg', hint=...)",
        )
    return "an error that names the layout"


def _layout(folder: Path) -> Iterator[str]:
    """Names and endings at the top of a folder, one of which an error should mention."""
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        yield path.name
        yield from filter(None, [path.suffix])


def _refusal(subject: DatasetSubject, cfg: Options, what: str) -> str:
    hint = "raise DataError in __init__ or split(), naming what is missing"
    try:
        dataset = subject.open(cfg)
        for split in dataset.info.splits or ("train",):
            dataset.split(split)
    except (DataError, ConfigError) as error:
        return f"{error.message} {error.hint or ''}"
    except SslbenchError:
        raise
    except Exception as error:
        raise BrokenRuleError(f"{what} is {type(error).__name__}: {error}", hint) from error
    raise BrokenRuleError(f"{what} is opened as if it held images", hint)


FILE_RULES: tuple[Rule[DatasetSubject], ...] = (
    Rule("a copy in another folder is the same", _moves),
    Rule("fingerprint follows images and targets", _covers),
    Rule("damaged files are errors that name them", _damaged),
    Rule("missing files are errors that tell the layout", _missing),
)
