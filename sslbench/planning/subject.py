"""What is to be planned: a configuration and the facts of its data set, with or without the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sslbench.config.compose import Composed
from sslbench.config.validate import Problem
from sslbench.data.splits import eval_split, source_of
from sslbench.data.views import expand
from sslbench.engine.setup import DEFAULT_SIZE, check_requirements, make_dataset
from sslbench.errors import ConfigError, DataError
from sslbench.plugin.api import Dataset, Published, ViewSpec

UNNAMED = Path("unnamed")
"""Stands for a folder that a plan does without."""


@dataclass(frozen=True)
class Subject:
    """One run to plan."""

    composed: Composed
    images: int
    """That training sees."""
    size: tuple[int, int]
    """Height and width of an image; typical ones if sizes vary."""
    same_size: bool
    classes: int | None
    """None unless the method sees labels."""
    views: tuple[ViewSpec, ...]
    """One for each view, sizes filled in."""
    facts: str
    """Where the data set's numbers come from."""

    @property
    def batch(self) -> int:
        """Images in the global batch."""
        return self.composed.core.train.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch

    @property
    def steps(self) -> int:
        return self.composed.core.train.epochs * self.steps_per_epoch

    def with_batch(self, rows: int) -> Subject:
        """The same run with another global batch."""
        core = self.composed.core
        train = core.train.model_copy(update={"batch_size": rows})
        return replace(self, composed=replace(self.composed, core=core.model_copy(update={"train": train})))

    @property
    def side(self) -> int:
        """Of the largest view."""
        return max(view.size or DEFAULT_SIZE for view in self.views)

    @property
    def pixels(self) -> int:
        """Of all views of an image."""
        return sum((view.size or DEFAULT_SIZE) ** 2 for view in self.views)


def stand_ins(problems: Sequence[Problem]) -> list[str] | None:
    """Overrides for the folders of a data set that nobody named; None if something else is wrong as well."""
    keys = [problem.key for problem in problems]
    missing = [p for p in problems if p.key.startswith("dataset.") and p.message.startswith("required")]
    return [f"{key}={UNNAMED}" for key in keys] if len(missing) == len(keys) else None


def describe(composed: Composed, images: int | None) -> Subject:
    """What is planned.

    Args:
        images: number of training images that the user states; None: those of the data set.

    Raises:
        ConfigError: the method does not train, or the batch exceeds the images.
        DataError: the data set is not there, and nobody knows how many images it has.
    """
    if not composed.method.cls.trains:
        raise ConfigError(
            f"method '{composed.method.name}' does not train, so there is nothing to plan",
            hint="sslbench list methods",
        )
    check_requirements(composed)
    published, found = _facts(composed, stated=images is not None)
    total = images or published.images
    side = published.size[0] if published.same_size else DEFAULT_SIZE
    subject = Subject(
        composed=composed,
        images=total,
        size=published.size,
        same_size=published.same_size,
        classes=published.classes if composed.method.cls.uses_labels else None,
        views=expand(composed.method.cfg.views, side),  # type: ignore[attr-defined]
        facts=f"--images {images}; {found}" if images else found,
    )
    if subject.batch > total:
        raise ConfigError(
            f"train.batch_size={subject.batch} exceeds the {total} training images",
            hint=f"train.batch_size={max(2, total // 4)}",
        )
    return subject


def _facts(composed: Composed, *, stated: bool) -> tuple[Published, str]:
    """Of the data set that is there, else the published ones."""
    try:
        return _of_files(composed, make_dataset(composed)), "the data set's files"
    except DataError as missing:
        published: Published | None = composed.dataset.cls.published
        name = composed.dataset.name
        if published is None and not stated:
            raise DataError(
                f"data set '{name}' is not there, and how many images it has is not published: {missing.message}",
                hint="--images N plans without it",
            ) from missing
        found = f"published numbers of '{name}', which is not there" if published else f"'{name}' is not there"
        return _labelled(composed, published or Published(0, (DEFAULT_SIZE, DEFAULT_SIZE))), found


def _of_files(composed: Composed, dataset: Dataset) -> Published:
    info = dataset.info
    side = info.size or DEFAULT_SIZE
    if composed.method.cls.uses_labels:
        _, indices = eval_split(dataset, "train", composed.core.data.val_fraction)
        count = len(indices)
    else:
        count = len(source_of(dataset, info.pretrain_split))
    declared = dataset.published.size if dataset.published and info.size is None else (side, side)
    return Published(count, declared, len(info.classes), same_size=info.size is not None)


def _labelled(composed: Composed, published: Published) -> Published:
    """Methods that see labels train on what ``val`` leaves of the images."""
    if not composed.method.cls.uses_labels:
        return published
    kept = round(published.images * (1 - composed.core.data.val_fraction))
    return Published(kept, published.size, published.classes, same_size=published.same_size)
