"""Weight files of other programs: where they keep the backbone, and what its tensors are called there.

Adding a program means adding a row to :data:`LAYOUTS`. Nothing is guessed: every tensor of the backbone must be in
the file, and every tensor of the file must be the backbone's or one that the layout names as something else.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslbench.engine.checkpoint import load_tensors
from sslbench.errors import CheckpointError, did_you_mean
from sslbench.plugin.api import Backbone

_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
#: Old training programs saved these beside the weights. They hold data and run nothing.
_PLAIN_OBJECTS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "?")),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]
_LISTED = 8
_COUNTER = "num_batches_tracked"
"""Batch normalisation counts its batches since torch 0.4.1; nothing but a momentum of None reads the count."""


@dataclass(frozen=True)
class Layout:
    """How one program writes its weights. Patterns are globs over keys without a leading ``module.``."""

    name: str
    what: str
    entries: tuple[str, ...] = ("",)
    """Top-level entries of the file that may hold the tensors, in order; the empty one is the file itself."""
    marks: tuple[str, ...] = ("*",)
    """A file has this layout if a key fits one of these."""
    bare_marks: tuple[str, ...] = ()
    """The tensors also lie in the file itself if a key fits one of these."""
    prefix: str = ""
    """In front of the backbone's keys."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions at the start of a key, behind the prefix, with what they become."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """What is no part of the backbone: its name in messages and the pattern of its keys."""
    projection: str = ""
    """Pattern of the ignored matrices that follow the backbone and each other; all other ignored ones follow the
    last of them. They are not loaded, but must fit. Empty: not looked at."""
    uses_labels: bool = False
    """Whether such weights were trained with labels."""
    doubtful_entry: str = ""
    """A file with this top-level entry may have been trained with labels."""

    def places(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Entries that may hold the tensors, with the marks that their keys need."""
        for entry in self.entries:
            yield entry, self.marks
        if self.bare_marks:
            yield "", self.bare_marks


_NUMBERED_RESNET = (
    (r"0\.", "conv1."),
    (r"1\.", "bn1."),
    (r"4\.", "layer1."),
    (r"5\.", "layer2."),
    (r"6\.", "layer3."),
    (r"7\.", "layer4."),
)
#: In the order in which ``auto`` tries them.
LAYOUTS = (
    Layout(
        "scrl",
        "SCRL and BYOL (kakaobrain/scrl): a ResNet as a numbered list",
        entries=("online_network_state_dict", ""),
        marks=("encoder.0.weight",),
        prefix="encoder.",
        renames=_NUMBERED_RESNET,
        ignored={"projector": "projector.*"},
    ),
    Layout(
        "relational",
        "relational reasoning and its baselines (mpatacchiola/self-supervised-relational-reasoning)",
        entries=("backbone",),
        bare_marks=("layer[1-4].conv.weight",),  # the demonstration saves its Conv-4 alone
        doubtful_entry="optimizer_finetune",
        renames=((r"layer(\d)\.(?=conv\.|bn\.)", r"block\1."),),
    ),
    Layout(
        "moco",
        "MoCo and Revisiting Contrastive SSL: the query encoder",
        entries=("state_dict", ""),
        marks=("encoder_q.*",),
        prefix="encoder_q.",
        ignored={"head": "encoder_q.fc.*", "encoder_k": "encoder_k.*", "queues": "*queue*"},
    ),
    Layout(
        "swav",
        "SwAV, DeepCluster-v2 and SeLa-v2 (facebookresearch/swav)",
        entries=("", "state_dict"),
        marks=("projection_head.*", "prototypes.*"),
        ignored={"projection_head": "projection_head.*", "prototypes": "prototypes.*"},
        projection="projection_head.*",
    ),
    Layout(
        "torchvision",
        "a classifier with torchvision's names, such as its supervised ResNets",
        entries=("", "state_dict", "model"),
        marks=("fc.weight",),
        ignored={"fc": "fc.*"},
        uses_labels=True,
    ),
    Layout(
        "plain", "the backbone alone, under its own names: backbone.pt of any sslbench run", ("", "state_dict")
    ),
)
NAMES = tuple(layout.name for layout in LAYOUTS)


@dataclass(frozen=True)
class Weights:
    """The backbone that a file holds."""

    layout: Layout
    tensors: dict[str, Tensor]
    """By our names."""
    unknown: tuple[str, ...]
    """Keys that the layout does not explain."""
    ignored: Mapping[str, int]
    """How many tensors of what else the file has."""
    epochs: int | None
    """How long it was trained, if the file says so."""
    doubtful: bool = False
    """Whether they may have been trained with labels, for all that the file says."""
    behind: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Shapes of the ignored matrices, where the layout says how they follow the backbone."""


def read_weights(file: Path, layout: str = "auto") -> Weights:
    """Read a file of another program. No code in it is ever executed.

    Raises:
        CheckpointError: unreadable, not tensors, or of no known layout.
    """
    content = _read(file)
    candidates = LAYOUTS if layout == "auto" else (_named(layout),)
    for candidate in candidates:
        for entry, marks in candidate.places():
            tensors = _tensors(content, entry)
            if any(fnmatchcase(key, mark) for key in tensors for mark in marks):
                return _sort(candidate, tensors, content)
    raise CheckpointError(
        f"{file} is no weight file of layout {' or '.join(c.name for c in candidates)}; "
        f"it holds {_some([str(key) for key in content])}",
        hint=f"--layout takes {', '.join(NAMES)}; any other program's weights can be renamed and saved as plain",
    )


def load_into(backbone: Backbone, weights: Weights, file: Path) -> int:
    """Load all of a backbone, or refuse.

    Returns:
        How many batch counters, which files of old programs lack, were set to 0.

    Raises:
        CheckpointError: naming what is missing, unexpected, of another shape or not finite.
    """
    wanted = backbone.state_dict()
    counters = {key for key in wanted if key.endswith(_COUNTER) and key not in weights.tensors}
    needed = {key: value for key, value in wanted.items() if key not in counters}
    findings = [*_findings(weights, needed, backbone.dim)]
    if findings:
        name = getattr(backbone, "name", type(backbone).__name__)
        raise CheckpointError(
            f"{file}, read as layout '{weights.layout.name}', does not fit backbone '{name}'\n"
            + "\n".join(f"  {finding}" for finding in findings),
            hint="check --backbone, its options (such as backbone.stem=imagenet), --image-size and --layout",
        )
    zeros = {key: torch.zeros_like(wanted[key]) for key in counters}
    backbone.load_state_dict({**weights.tensors, **zeros})
    return len(counters)


def _findings(weights: Weights, wanted: Mapping[str, Tensor], dim: int) -> Iterator[str]:
    found = weights.tensors
    missing = [key for key in wanted if key not in found]
    unexpected = [*weights.unknown, *(key for key in found if key not in wanted)]
    shared = [key for key in wanted if key in found]
    shapes = [
        f"{key} {[*found[key].shape]} instead of {[*wanted[key].shape]}"
        for key in shared
        if found[key].shape != wanted[key].shape
    ]
    broken = [key for key in shared if found[key].is_floating_point() and not found[key].isfinite().all()]
    for what, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", [*shapes, *_misfits(weights, dim)]),
        ("with values that are no finite numbers", broken),
    ):
        if keys:
            yield f"{len(keys)} {what}: {_some(keys)}"


def _misfits(weights: Weights, width: int) -> Iterator[str]:
    """Matrices behind the backbone that do not take what the one before gives."""
    projection = weights.layout.projection
    for key, (rows, columns) in sorted(
        weights.behind.items(), key=lambda item: not fnmatchcase(item[0], projection)
    ):
        if columns != width:
            yield f"{key} {[rows, columns]} instead of {[rows, width]}"
        if fnmatchcase(key, projection):
            width = rows


def _read(file: Path) -> Mapping[Any, Any]:
    if not file.is_file():
        raise CheckpointError(
            f"there is no file {file}", hint="give the path of a weight file: sslbench import FILE"
        )
    try:
        with torch.serialization.safe_globals(_PLAIN_OBJECTS):
            content: Any = load_tensors(file)
    except CheckpointError as error:
        foreign = _foreign_objects(file)
        if not foreign:
            raise
        raise CheckpointError(
            f"{file} is refused: it holds objects that could run code ({_some(foreign)})",
            hint="have its author save the weights alone: torch.save(model.state_dict(), FILE)",
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{file} holds a {type(content).__name__}, not named tensors",
            hint="save a state dict: torch.save(model.state_dict(), FILE)",
        )
    return content


def _foreign_objects(file: Path) -> list[str]:
    """Names of the objects that loading the file would create; empty if it is not that kind of file."""
    try:
        with torch.serialization.safe_globals(_PLAIN_OBJECTS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    except Exception:  # noqa: BLE001 - a damaged or old file makes torch raise nearly anything
        return []


def _named(name: str) -> Layout:
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise CheckpointError(
        f"there is no layout '{name}'{did_you_mean(name, NAMES)}", hint=f"--layout takes auto, {', '.join(NAMES)}"
    )


def _tensors(content: Mapping[Any, Any], entry: str) -> dict[str, Tensor]:
    """The tensors below an entry by name; none if it holds anything else."""
    found = content.get(entry) if entry else content
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        return {}
    tensors = {str(key): value for key, value in found.items()}
    if all(key.startswith("module.") for key in tensors):  # saved from within a data-parallel wrapper
        return {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _sort(layout: Layout, tensors: Mapping[str, Tensor], content: Mapping[Any, Any]) -> Weights:
    """Tell the backbone from what is ignored and from what nobody knows."""
    ours: dict[str, Tensor] = {}
    unknown: list[str] = []
    ignored: Counter[str] = Counter()
    behind: dict[str, tuple[int, int]] = {}
    for key, value in tensors.items():
        other = next((what for what, pattern in layout.ignored.items() if fnmatchcase(key, pattern)), None)
        if other:
            ignored[other] += 1
            if layout.projection and value.ndim == 2:
                behind[key] = (value.shape[0], value.shape[1])
        elif not key.startswith(layout.prefix):
            unknown.append(key)
        else:
            ours[_rename(key.removeprefix(layout.prefix), layout.renames)] = value
    epochs = content.get("epoch")
    known = epochs if isinstance(epochs, int) and not isinstance(epochs, bool) and epochs > 0 else None
    doubtful = bool(layout.doubtful_entry) and layout.doubtful_entry in content
    return Weights(layout, ours, tuple(unknown), dict(ignored), known, doubtful, behind)


def _rename(key: str, renames: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        changed, count = re.subn(rf"\A{pattern}", replacement, key)
        if count:
            return changed
    return key


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    return ", ".join(words[:_LISTED]) + more
