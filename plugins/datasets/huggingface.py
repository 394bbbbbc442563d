"""Image data sets of the Hugging Face library `datasets`: `--dataset hf:NAME`, or `hf:FOLDER` without network.

Needs `pip install 'sslbench[huggingface]'`. The library is Apache-2.0; each data set has a licence of its own. The
library only finds and opens tables: images are decoded here, and no code that comes with a data set is ever run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslbench.config.options import cosmetic
from sslbench.data.encoded import EncodedSource
from sslbench.data.filesets import NormalizedOptions
from sslbench.data.imagefile import read_bytes
from sslbench.data.kept import WORTH_KEEPING, kept
from sslbench.data.revision import file_state
from sslbench.errors import DataError, MissingExtraError, did_you_mean
from sslbench.plugin.api import Dataset, DatasetInfo
from sslbench.plugin.hooks import hookimpl

_LABELLED = ("ClassLabel", "Value")
_USUAL: Mapping[str, tuple[str, ...]] = {"val": ("validation", "val", "valid", "dev"), "test": ("test",)}
_ENDINGS = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"))
_WHOLE_IMAGES, _SAMPLED_IMAGES, _SAMPLED_BYTES = 20_000, 4_096, 64 << 10


class HuggingFaceOptions(NormalizedOptions):
    """Options of `hf`."""

    path: str = cosmetic(...)
    """Name of a data set on the Hugging Face hub, or a folder: one that `save_to_disk` wrote, or one of parquet
    files or images that `datasets.load_dataset(FOLDER)` reads. `hf:PATH` sets it."""
    config: str | None = None
    """Which of the data set's configurations, if it has several."""
    revision: str | None = None
    """Branch, tag or commit on the hub; unset: the newest one."""
    image_column: str | None = None
    """The column of images; unset: the only one of that type."""
    label_column: str | None = None
    """The column of class labels, of whole numbers or of words; unset: the only one of type `ClassLabel`, else the
    data set has no labels."""
    train_split: str = "train"
    """The split to train on."""
    val_split: str | None = None
    """The validation split; unset: `validation`, `val`, `valid` or `dev` if it is there and labelled, else
    evaluations carve `val` off `train`."""
    test_split: str | None = None
    """The test split; unset: `test` if it is there and labelled."""
    label: str | None = cosmetic(None)
    """Its name in tables and metric keys; unset: `hf-` and the last part of `path`."""


class TableSource(EncodedSource):
    """Images in a column of a table.

    Args:
        table: with this column, which is not decoded.
        name: of the split, for messages.
        targets: int64 ``[N]``, or None.
    """

    def __init__(self, table: Any, column: str, name: str, targets: Tensor | None) -> None:
        super().__init__(targets)
        self._table = table.select_columns([column])
        self._column = column
        self._name = name

    def __len__(self) -> int:
        return len(self._table)

    def encoded(self, index: int) -> NDArray[np.uint8]:
        row = self._table[index][self._column] or {}
        if row.get("bytes"):
            return np.frombuffer(bytearray(row["bytes"]), np.uint8)
        if row.get("path"):
            return read_bytes(Path(row["path"]))
        raise DataError(f"{self._name}[{index}] has no image", hint="drop such rows from the data set")

    def describe(self, index: int) -> str:
        """With the ending that its content has, since decoders are chosen by it."""
        start = bytes((self._table[index][self._column] or {}).get("bytes") or b"")[:4]
        path = (self._table[index][self._column] or {}).get("path") or ""
        known = (ending for magic, ending in _ENDINGS if start.startswith(magic))
        return f"{self._name}[{index}]{next(known, os.path.splitext(path)[1])}"

    def revision(self) -> str | None:
        """Of targets, of which a file may hold several columns, of files that the library maps into memory, and
        of image files the table only points at."""
        files = [file["filename"] for file in self._table.cache_files]
        if not files:
            return None
        state = hashlib.blake2b(f"{self._name} {self._column} {len(self)}".encode(), digest_size=16)
        if self.targets is not None:
            state.update(self.targets.numpy().tobytes())
        for file in files:
            state.update(repr((os.path.abspath(file), file_state(file))).encode())
        for path in self._outside():
            state.update(repr((path, file_state(path))).encode())
        return state.hexdigest()

    def _outside(self) -> Iterator[str]:
        for image in self._stored():
            if not image["bytes"].is_valid and image["path"].is_valid:
                yield str(image["path"].as_py())

    def _stored(self) -> Iterator[Any]:
        """The column's cells, without a copy of what they hold."""
        for batch in self._table.with_format("arrow").iter(batch_size=256):
            yield from batch[self._column]

    def digest(self) -> str:
        """Of contents: lengths and targets of all images, whole images of up to 20,000, beyond that the first
        64 KiB of some 4,000."""
        state = hashlib.blake2b(digest_size=16)
        if self.targets is not None:
            state.update(self.targets.numpy().tobytes())
        step = -(-len(self) // _SAMPLED_IMAGES) if len(self) > _WHOLE_IMAGES else 1
        for number, content in enumerate(map(_content, self._stored())):
            state.update(len(content).to_bytes(8, "little"))
            if number % step == 0:
                state.update(content if step == 1 else content[:_SAMPLED_BYTES])
        return state.hexdigest()

    def kept_digest(self) -> str:
        """The same, taken again only if files have changed."""
        if len(self) < WORTH_KEEPING:
            return self.digest()

        def numbers() -> NDArray[np.int64]:
            return np.frombuffer(bytes.fromhex(self.digest()), np.int64)

        return kept("hf", self.revision, numbers).tobytes().hex()


def _content(image: Any) -> memoryview:
    """The bytes of a stored cell, empty if it has none."""
    if image["bytes"].is_valid:
        return memoryview(image["bytes"].as_buffer())
    return read_bytes(Path(image["path"].as_py())).data if image["path"].is_valid else memoryview(b"")


class HuggingFace(Dataset):
    """A data set that the library `datasets` can open, with one image column and at most one label per image."""

    name = "hf"
    Config = HuggingFaceOptions
    selector = "path"
    cfg: HuggingFaceOptions

    def __init__(self, cfg: HuggingFaceOptions) -> None:
        super().__init__(cfg)
        self._tables = self._chosen(_open(cfg))
        self._image = self._image_column()
        self._label = self._label_column()
        for split in _USUAL:
            if getattr(cfg, f"{split}_split") is None and self._is_unlabelled(split):
                del self._tables[split]
        self._sources: dict[str, TableSource] = {}

    @property
    def key(self) -> str:
        return self.cfg.label or f"{self.name}-{Path(self.cfg.path).expanduser().resolve().name}"

    @cached_property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=self._classes,
            size=self.split("train").common_side(),
            mean=self.cfg.mean,
            std=self.cfg.std,
            splits=tuple(self._tables),
            task="classification" if self._classes else "unlabelled",
        )

    def split(self, name: str) -> TableSource:
        if name not in self._tables:
            raise DataError(
                f"data set '{self.cfg.path}' has no split '{name}' (it has {', '.join(self._tables)})",
                hint=f"dataset.{name}_split=SPLIT names the split of it to use",
            )
        if name not in self._sources:
            from datasets import Image

            table = self._tables[name].cast_column(self._image, Image(decode=False))
            self._sources[name] = TableSource(table, self._image, f"{self.key}/{name}", self._targets(name))
        return self._sources[name]

    def fingerprint(self) -> str:
        """Covers splits, names of classes, labels and contents; not the format or the place of the files."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = [f"{split} {self.split(split).kept_digest()}" for split in sorted(self._tables)]
        text = "\n".join([*self._classes, *parts])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _chosen(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        """The library's splits under our names."""
        cfg = self.cfg
        wanted = {"train": (cfg.train_split,)} | {
            split: (named,) if (named := getattr(cfg, f"{split}_split")) else _USUAL[split] for split in _USUAL
        }
        if len(tables) == 1 and cfg.train_split == "train":
            wanted["train"] = tuple(tables)
        found = {split: next((n for n in names if n in tables), None) for split, names in wanted.items()}
        for split in wanted:
            if found[split] is None and getattr(cfg, f"{split}_split"):
                raise DataError(
                    f"data set '{cfg.path}' has no split '{wanted[split][0]}'"
                    f"{did_you_mean(wanted[split][0], tables)} (it has {', '.join(tables)})",
                    hint=f"dataset.{split}_split={next(iter(tables))}",
                )
        self._keep_apart(found)
        return {split: tables[name] for split, name in found.items() if name is not None}

    def _keep_apart(self, found: dict[str, str | None]) -> None:
        """No images are trained on and tested with: a split found by its usual name gives way."""
        for split in _USUAL:
            others = [found[other] for other in found if other != split]
            if getattr(self.cfg, f"{split}_split") is None and found[split] in others:
                found[split] = None
            if found[split] is not None and found[split] == found["train"]:
                raise DataError(
                    f"dataset.{split}_split={found[split]}: data set '{self.cfg.path}' is trained on that split",
                    hint=f"dataset.{split}_split=ANOTHER, or leave it unset",
                )

    def _column(self, option: str, named: str | None, of_type: tuple[str, ...], needed: bool) -> str | None:
        """The column an option names, or the only one of the first of the types."""
        features = self._tables["train"].features
        if named is not None:
            if named not in features:
                raise DataError(
                    f"data set '{self.cfg.path}' has no column '{named}'{did_you_mean(named, features)} "
                    f"(it has {', '.join(features)})",
                    hint=f"dataset.{option}={next(iter(features))}",
                )
            return named
        fitting = [name for name, feature in features.items() if type(feature).__name__ == of_type[0]]
        if len(fitting) > 1 or (needed and not fitting):
            many = f"{len(fitting)} columns" if fitting else "no column"
            listed = fitting or list(features)
            raise DataError(
                f"data set '{self.cfg.path}' has {many} of type {of_type[0]} (it has {', '.join(features)})",
                hint=f"dataset.{option}={listed[0]}",
            )
        return fitting[0] if fitting else None

    def _image_column(self) -> str:
        column = self._column("image_column", self.cfg.image_column, ("Image",), needed=True)
        assert column is not None
        kind = self._tables["train"].features[column]
        if type(kind).__name__ != "Image" and getattr(kind, "dtype", None) not in ("binary", "large_binary"):
            raise DataError(
                f"column '{column}' of data set '{self.cfg.path}' holds no images but {kind}",
                hint="dataset.image_column=COLUMN",
            )
        return column

    def _label_column(self) -> str | None:
        column = self._column("label_column", self.cfg.label_column, _LABELLED, needed=False)
        kind = self._tables["train"].features[column] if column else None
        if column and type(kind).__name__ not in _LABELLED:
            raise DataError(
                f"column '{column}' of data set '{self.cfg.path}' is no single class per image but {kind}",
                hint="dataset.label_column=COLUMN, one of whole numbers or of words",
            )
        return column

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        if self._label is None:
            return ()
        names = getattr(self._tables["train"].features[self._label], "names", None)
        if names is not None:
            return tuple(names)
        values = np.unique(self._raw_labels("train"))
        if values.dtype.kind in "iu":
            return tuple(str(number) for number in range(int(values.max()) + 1))
        return tuple(str(value) for value in values)

    def _raw_labels(self, split: str) -> NDArray[Any]:
        if self._label not in self._tables[split].features:
            raise DataError(
                f"split '{split}' of data set '{self.cfg.path}' has no column '{self._label}' "
                f"(it has {', '.join(self._tables[split].features)})",
                hint=f"dataset.{split}_split=ANOTHER, or leave it unset",
            )
        column = self._tables[split].select_columns([self._label]).with_format("arrow")[:].column(self._label)
        if column.null_count:
            raise DataError(
                f"{column.null_count} of {len(column)} images in split '{split}' of data set '{self.cfg.path}' "
                "have no label",
                hint=f"dataset.{split}_split=ANOTHER, or dataset.label_column=ANOTHER",
            )
        values = column.to_numpy()
        return np.asarray(values.astype(str) if values.dtype.kind == "O" else values)

    def _targets(self, split: str) -> Tensor | None:
        if self._label is None:
            return None
        values = self._in_order(split, self._raw_labels(split))
        if values.dtype.kind == "U":
            numbers = {name: number for number, name in enumerate(self._classes)}
            values = np.array([numbers.get(name, -1) for name in values.tolist()], np.int64)
        if values.dtype.kind not in "iu":
            raise DataError(f"column '{self._label}' of data set '{self.cfg.path}' holds no classes")
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < len(self._classes):
            raise DataError(
                f"split '{split}' of data set '{self.cfg.path}' has labels that are none of its "
                f"{len(self._classes)} classes",
                hint=f"dataset.{split}_split=ANOTHER, or dataset.label_column=ANOTHER",
            )
        return torch.from_numpy(values.astype(np.int64))

    def _in_order(self, split: str, values: NDArray[Any]) -> NDArray[Any]:
        """Labels as numbers of our classes, of a split that numbers the same names in another order."""
        names = getattr(self._tables[split].features[self._label], "names", None)
        if names is None or tuple(names) == self._classes:
            return values
        if set(names) != set(self._classes):
            raise DataError(
                f"split '{split}' of data set '{self.cfg.path}' has other classes than its training split: "
                f"{', '.join(sorted(set(names) ^ set(self._classes))[:5])}",
                hint=f"dataset.{split}_split=ANOTHER, or dataset.label_column=ANOTHER",
            )
        numbers = np.array([*map(self._classes.index, names), -1], np.int64)
        return numbers[np.where((values >= 0) & (values < len(names)), values, -1)]

    def _is_unlabelled(self, split: str) -> bool:
        """Whether a split has no labels or hides them behind -1, as test splits on the hub do."""
        if split not in self._tables or self._label is None:
            return False
        if self._label not in self._tables[split].features:
            return True
        values = self._raw_labels(split)
        return values.dtype.kind == "i" and bool((values < 0).all())


def _open(cfg: HuggingFaceOptions) -> dict[str, Any]:
    """The library's tables by its names of splits."""
    library = _library()
    folder = Path(cfg.path).expanduser()
    if not folder.exists() and (cfg.path.startswith(("/", ".", "~")) or cfg.path.count("/") > 1):
        raise DataError(f"dataset.path: no folder {folder}", hint="dataset.path=FOLDER, or --dataset hf:FOLDER")
    try:
        opened = _load(library, cfg, folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_open(cfg, folder, error) from error
    return dict(opened) if isinstance(opened, dict) else {"train": opened}


def _load(library: ModuleType, cfg: HuggingFaceOptions, folder: Path) -> Any:
    if any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return library.load_from_disk(str(folder))
    if folder.exists():
        return library.load_dataset(str(folder), cfg.config)
    return library.load_dataset(cfg.path, cfg.config, revision=cfg.revision)


def _cannot_open(cfg: HuggingFaceOptions, folder: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "Config name is missing" in reason:
        hint = "dataset.config=NAME"
    elif folder.exists():
        hint = "a folder of save_to_disk, of parquet files or of images: dataset.path=FOLDER"
    else:
        hint = (
            "check the name and the network; where there is none, load it elsewhere, save_to_disk(FOLDER), and "
            "--dataset hf:FOLDER"
        )
    return DataError(f"the data set '{cfg.path}' cannot be opened: {reason[:400]}", hint=hint)


def _library() -> ModuleType:
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise MissingExtraError("data set 'hf'", "datasets", "sslbench[huggingface]") from error
    library: ModuleType = datasets
    return library


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [HuggingFace]
