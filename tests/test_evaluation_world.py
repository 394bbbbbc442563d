"""Several processes evaluate as one does, for every protocol, with and without a common folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from evals_kit import make_backbone, make_dataset
from streaming_kit import divided, evaluate, same_bits, small_device
from torch import Tensor

from sslbench.config.schema import DataOptions
from sslbench.data.placing import Room
from sslbench.errors import LaunchError
from sslbench.evaluation.features import Extractor, Preprocessing
from sslbench.evaluation.shards import Layout, ShardedTable
from sslbench.evaluation.tables import Asked, StoredTable, Tables

pytestmark = pytest.mark.slow  # starts processes

CPU = torch.device("cpu")
FEW = 10
OWN = 1
"""Shards of 500 images that a rank of three computes."""


def extractor(count: int) -> Extractor:
    return Extractor(
        make_backbone().eval(),
        make_dataset().split("train"),
        torch.arange(count),
        Preprocessing(16, 1.0, (0.3,) * 3, (0.3,) * 3),
        64,
        CPU,
        DataOptions(),
    )


def table(folder: Path | None, count: int, asked: Asked = "auto") -> Tensor:
    stored: StoredTable = Tables(folder, CPU, asked).get({"images": count}, extractor(count))
    assert bool(stored.readable.all())
    return stored.features.clone()


def join(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=timedelta(minutes=5))


def every_protocol(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    held = evaluate(folder / "held", folder / "cache")
    with small_device():
        streamed = evaluate(folder / "streamed", folder / "small")
    torch.save({"held": held, "streamed": streamed}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def more_ranks_than_classes(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    torch.save(evaluate(folder / "jobs", folder / "cache", divided()), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def few_images(rank: int, world: int, folder: Path) -> None:
    """More ranks than shards, at first without a cache; then a table of which one shard is missing."""
    join(rank, world, folder)
    found = [table(None, FEW), table(folder / "few", FEW), table(folder / "many", 500)]
    dist.barrier()  # all have opened it
    if rank == 0:
        next(path for path in sorted((folder / "many").glob("*/rows-*"))[1:]).unlink()
    dist.barrier()
    found.append(table(folder / "many", 500))
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def own_folders(rank: int, world: int, folder: Path) -> None:
    """Nodes without a common file system: rank 0 alone, ranks 1 and 2 together; one has a part already."""
    join(rank, world, folder)
    node = folder / ("a" if rank == 0 else "b")
    found = [table(node, 500)]
    if rank == 0:
        shutil.rmtree(node)
    dist.barrier()
    found.append(table(node, 500))
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def no_room(rank: int, world: int, folder: Path) -> None:
    """Rank 0 has room for all; the disk of ranks 1 and 2 takes their own shards and then nothing more."""
    join(rank, world, folder)
    fill_up_disks(rank)
    node = folder / ("a" if rank == 0 else "b")
    torch.save([table(node, 500, "mmap")], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def no_room_at_all(rank: int, world: int, folder: Path) -> None:
    """The same where memory has no room either: what is told on each rank."""
    join(rank, world, folder)
    fill_up_disks(rank)
    Room.of = lambda _: Room(host=0)  # type: ignore[method-assign,assignment,misc]
    try:
        table(folder / ("a" if rank == 0 else "b"), 500, "mmap")
    except (OSError, LaunchError) as error:
        (folder / f"rank{rank}.txt").write_text(str(error))


def fill_up_disks(rank: int) -> None:
    write, own = ShardedTable.write, []

    def full(shards: ShardedTable, number: int, rows: Tensor, missing: Iterable[int]) -> None:
        if rank and len(own) == OWN:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own.append(number)
        write(shards, number, rows, missing)

    ShardedTable.write = full  # type: ignore[method-assign]


def read_only(rank: int, world: int, folder: Path) -> None:
    """A complete cache in which nothing can be made."""
    join(rank, world, folder)
    found = [table(folder / "cache", 500)]
    dist.barrier()
    Path.touch = refuse  # type: ignore[assignment]
    Path.unlink = refuse  # type: ignore[assignment]
    ShardedTable.write = refuse  # type: ignore[assignment]
    found.append(table(folder / "cache", 500))
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def refuse(*_: Any, **__: Any) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def close(found: Any, expected: Any, name: str) -> None:
    """Equal within rounding; counts may differ by the image or two whose scores tie."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            close(found[key], value, f"{name}/{key}")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3, msg=lambda m: f"{name}: {m}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-3), name


def test_two_ranks_give_the_results_of_one_for_every_protocol(tmp_path: Path) -> None:
    mp.spawn(every_protocol, args=(2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert same_bits(first, second)
    alone = evaluate(tmp_path / "alone", tmp_path / "alone-cache")
    assert alone.keys() == first["held"].keys() == first["streamed"].keys()
    for kind, results in first.items():
        for name, expected in alone.items():
            close(results[name], expected, f"{kind} {name}")


def test_ranks_without_a_class_or_a_draw_get_the_results_of_one(tmp_path: Path) -> None:
    mp.spawn(more_ranks_than_classes, args=(4, tmp_path), nprocs=4)
    alone = evaluate(tmp_path / "alone", tmp_path / "cache", divided())
    for rank in range(4):
        close(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), alone, f"rank {rank}")


def test_ranks_without_an_image_get_the_whole_table(tmp_path: Path) -> None:
    assert len(Layout.of(FEW, 64, 3).ranges) == 1
    mp.spawn(few_images, args=(3, tmp_path), nprocs=3)
    for rank in range(3):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for ours, count in zip(found, (FEW, FEW, 500, 500), strict=True):
            torch.testing.assert_close(ours, table(None, count), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[2], found[3])


def test_shards_travel_to_nodes_that_do_not_have_them(tmp_path: Path) -> None:
    mp.spawn(own_folders, args=(3, tmp_path), nprocs=3)
    expected = table(None, 500)
    for rank in range(3):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for ours in found:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(*found)
    names = [sorted(path.name for path in (tmp_path / node).glob("*/*")) for node in "ab"]
    assert names[0] == names[1]
    assert len(names[0]) > 2


@pytest.mark.parametrize("trouble", [no_room, read_only])
def test_nodes_that_cannot_write_get_the_whole_table(tmp_path: Path, trouble: Any) -> None:
    mp.spawn(trouble, args=(3, tmp_path), nprocs=3)
    expected = table(None, 500)
    for rank in range(3):
        for ours in torch.load(tmp_path / f"rank{rank}.pt", weights_only=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_all_ranks_end_when_one_has_room_nowhere(tmp_path: Path) -> None:
    mp.spawn(no_room_at_all, args=(3, tmp_path), nprocs=3)
    told = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(3)]
    assert all("No space left" in words for words in told), told
