"""A step's gradient from several parts of the batch in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from sslbench.config.compose import Composed
from sslbench.data.loader import rank_share
from sslbench.errors import ConfigError
from sslbench.plugin.api import Batch, View
from sslbench.rng import Draws


def part_weights(global_batch: int, world: int, count: int) -> list[float]:
    """What share of the global batch each part holds, over all ranks."""
    rows = [len(rank_share(global_batch, rank, world)) for rank in range(world)]
    return [sum(len(rank_share(own, part, count)) for own in rows) / global_batch for part in range(count)]


def parts_of(batch: Batch, count: int) -> Iterator[Batch]:
    """This rank's rows in ``count`` parts, each with the random numbers it has in the whole batch."""
    if count == 1:
        yield batch
        return
    for part in range(count):
        rows = rank_share(len(batch), part, count)
        yield _rows(batch, slice(rows.start, rows.stop))


def _rows(batch: Batch, rows: slice) -> Batch:
    views = tuple(View(*(field[rows] for field in view)) for view in batch.views)
    draws = Draws(batch.draws.seed, batch.draws.step, batch.draws.positions[rows])
    return Batch(views, batch.index[rows], draws, None if batch.labels is None else batch.labels[rows])


def gathering(model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """A context for one part: ranks exchange gradients after the last one only."""
    no_sync = getattr(model, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()


def check_accumulation(composed: Composed) -> None:
    """Refuse to sum parts of a loss that is not the sum of its parts.

    Raises:
        ConfigError: the method does not declare that it is.
    """
    count, method = composed.core.train.accumulate, composed.method
    if count > 1 and not method.cls.accumulates:
        raise ConfigError(
            f"train.accumulate={count}: the loss of method '{method.name}' is not a mean over images that do not "
            "see each other (it compares, balances, weights or stores them), so parts of a batch do not add up to "
            "the batch",
            hint="more devices, train.checkpoint_activations=true for memory, or a smaller train.batch_size",
        )


def check_part_sizes(composed: Composed, world: int) -> None:
    """Refuse parts without an image.

    Raises:
        ConfigError: some rank would have none.
    """
    train = composed.core.train
    if train.accumulate * world > train.batch_size:
        raise ConfigError(
            f"train.accumulate={train.accumulate} on {world} devices leaves parts of train.batch_size="
            f"{train.batch_size} without an image",
            hint=f"train.accumulate={max(1, train.batch_size // world)} or less",
        )
