"""Features of a whole split, computed by all ranks into files, and kept where there is room for them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import Tensor

from sslbench import comm
from sslbench.data.loader import rank_share
from sslbench.data.placing import Room
from sslbench.errors import write_failure
from sslbench.evaluation.features import Extractor, check_complete, json_digest
from sslbench.evaluation.shards import Layout, ShardedTable

logger = logging.getLogger(__name__)

CACHE_VERSION = 3
"""Part of every cache key. Bump it when the same inputs may give other features."""

_WORTH_A_LINE = 100_000_000
"""Bytes of a table from which on its place is told."""

Asked = Literal["auto", "device", "host", "mmap"]


class Place(StrEnum):
    """Where a table is, in words."""

    DEVICE = "on the device"
    HOST = "in the memory of the host"
    MAPPED = "mapped from the feature cache"


@dataclass(frozen=True)
class StoredTable:
    """The features of all samples of a base split."""

    features: Tensor
    """float32 ``[N,D]`` on the device or the host, not to be written to; what unreadable images have means
    nothing."""
    readable: Tensor
    """bool ``[N]`` on the CPU."""


def choose_place(size: int, asked: Asked, room: Room, *, on_disk: bool) -> tuple[Place, str]:
    """Where a table of ``size`` bytes goes, and why.

    Args:
        on_disk: whether it is, or will be, in files that can be mapped.
    """
    if asked != "auto":
        found = {"device": Place.DEVICE, "host": Place.HOST, "mmap": Place.MAPPED if on_disk else Place.HOST}[
            asked
        ]
        return found, f"data.features={asked}"
    if room.device is not None and size <= room.device / 2:
        return Place.DEVICE, f"of {_megabytes(room.device)} free there"
    if on_disk and (room.device is None or size * room.processes > room.host / 2):
        return Place.MAPPED, "once for all processes"
    return (
        Place.HOST if room.device is not None else Place.DEVICE
    ), f"of {_megabytes(room.host)} free on the host"


class Tables:
    """The feature cache: a folder of tables, each named by a digest of everything it depends on.

    Deleting files or the whole folder is always safe. Without a folder, tables are kept in memory.

    Every rank must call every method. Ranks write what they computed into the folder that they see, shard by
    shard; a shard that exists is not computed again. Where ranks do not share the folder (the lowest rank that
    sees it leads those that do), shards travel one at a time. Memory of a process: the rows of a shard on the
    device and on the host, ``2 * 4 * 4096 * D`` bytes, and the table itself unless it is mapped.
    """

    def __init__(self, folder: Path | None, device: torch.device, asked: Asked) -> None:
        self.folder = folder
        self.device = device
        self.asked = asked

    def path(self, key: Mapping[str, Any]) -> Path | None:
        """Where the table of ``key`` is or would be."""
        return self.folder / json_digest({**key, "version": CACHE_VERSION}) if self.folder else None

    def get(self, key: Mapping[str, Any], extractor: Extractor) -> StoredTable:
        """The table of ``key``: its shards from the cache if possible, the others computed and stored.

        Raises:
            DataError: more images are unreadable than ``extractor`` allows.
            OSError: shards can be neither stored nor kept in memory.
        """
        path = self.path(key)
        rows, dim = len(extractor.indices), extractor.backbone.dim
        shards = _begun(path, key, Layout.of(rows, dim, comm.world())) if path else None
        place, why = choose_place(4 * rows * dim, self.asked, Room.of(self.device), on_disk=shards is not None)
        place, why = comm.broadcast_object((place, why))
        size = 4 * rows * dim
        logger.log(
            logging.INFO if size >= _WORTH_A_LINE else logging.DEBUG,
            "features of %d images (%s) are %s: %s%s",
            *(rows, _megabytes(size), place, why, f"; {path}" if shards else ""),
        )
        if shards is None:
            return _in_memory(extractor, self._target(place))
        return _Build(shards, extractor, _leaders(shards.folder)).run(self._target(place))

    def _target(self, place: Place) -> torch.device | None:
        """The device of the table; None: it is mapped."""
        return {Place.DEVICE: self.device, Place.HOST: torch.device("cpu"), Place.MAPPED: None}[place]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _begun(path: Path, key: Mapping[str, Any], wanted: Layout) -> ShardedTable | None:
    """The table's folder on every rank; None if one of them has none. Rank 0's layout is that of all."""
    layout = comm.broadcast_object(ShardedTable.known_layout(path) or wanted)
    shards = ShardedTable(path, layout if (layout.rows, layout.dim) == (wanted.rows, wanted.dim) else wanted)
    failed = torch.zeros(1, dtype=torch.int64)
    try:
        shards.begin(key)
    except OSError as error:
        logger.warning("features are not cached in %s: %s", path.parent, write_failure(error) or error)
        failed += 1
    return None if int(comm.all_sum(failed)) else shards


def _in_memory(extractor: Extractor, device: torch.device | None) -> StoredTable:
    """Without files: every rank computes its share and all get the whole."""
    target = device or torch.device("cpu")
    rows, places = comm.patiently(lambda: extractor.share(comm.rank(), comm.world(), target))
    table = torch.zeros(len(extractor.indices), rows.shape[1], device=target)
    readable = torch.zeros(len(table), dtype=torch.bool)
    readable[comm.gather(places)] = True
    check_complete(int((~readable).sum()), extractor.max_unreadable)
    table[readable.nonzero().flatten().to(target)] = comm.gather(rows)
    return StoredTable(table, readable)


def _leaders(folder: Path) -> list[int]:
    """By rank, the lowest rank that sees the same folder; where none can write to it, each leads itself."""
    if comm.world() == 1:
        return [0]
    meeting = f".{comm.broadcast_object(uuid4().hex)}"
    own = folder / f"{meeting}.{comm.rank()}"
    with suppress(OSError):  # a folder that can only be read, or is full
        own.touch()
    comm.barrier()
    seen = [int(path.name.rpartition(".")[2]) for path in folder.glob(f"{meeting}.*")]
    leaders: list[int] = comm.gather(torch.tensor([min(seen, default=comm.rank())])).tolist()
    with suppress(OSError):
        own.unlink(missing_ok=True)
    return leaders


class _Build:
    """Completes the shards of one table.

    Args:
        leaders: see :func:`_leaders`.
    """

    def __init__(self, shards: ShardedTable, extractor: Extractor, leaders: list[int]) -> None:
        self.shards = shards
        self.extractor = extractor
        self.leaders = leaders
        self.leader = leaders[comm.rank()]
        self.count = len(shards.layout.ranges)
        self.missing: dict[int, list[int]] = {}
        """By shard that this rank looked at or made, the positions of its unreadable images."""
        self.unwritten: dict[int, Tensor] = {}
        """Shards that this rank computed and for which there was no room on the disk."""
        self.full = False

    def run(self, device: torch.device | None) -> StoredTable:
        """The table on a device; None: mapped."""
        have = self._found()
        have = self._computed(have)
        readable = self._readable()
        check_complete(int((~readable).sum()), self.extractor.max_unreadable)
        holders = _merged((number, comm.rank()) for number in self.unwritten)
        holders |= self._spread(have, holders)
        comm.barrier()
        if device is None and not holders:
            return StoredTable(self.shards.mapped(), readable)
        return StoredTable(self._copied(device or torch.device("cpu"), holders), readable)

    def _found(self) -> Tensor:
        """int64 ``[W,S]``: which leader has which whole shard. Those that see a folder share the reading."""
        group = [rank for rank, leader in enumerate(self.leaders) if leader == self.leader]
        for number in range(group.index(comm.rank()), self.count, len(group)):
            try:
                missing = self.shards.check(number)
            except ValueError as error:
                logger.warning("the feature cache is damaged: %s; computing these features again", error)
                self.shards.discard(number)
                continue
            if missing is not None:
                self.missing[number] = missing
        self._forget_unreadable()
        return self._noted(self.missing)

    def _forget_unreadable(self) -> None:
        """Reading images again names those that are missing, where more are than allowed, and sees repaired
        ones."""
        if int((~self._readable()).sum()) > self.extractor.max_unreadable:
            self.missing = {number: missing for number, missing in self.missing.items() if not missing}

    def _noted(self, numbers: Mapping[int, Any]) -> Tensor:
        have = torch.zeros(comm.world(), self.count, dtype=torch.int64)
        have[self.leader, list(numbers)] = 1
        return comm.all_sum(have)

    def _computed(self, have: Tensor) -> Tensor:
        lacking = (have.sum(0) == 0).nonzero().flatten().tolist()
        if lacking and len(lacking) < self.count:
            done = self.count - len(lacking)
            logger.info("%d of %d parts of the features were computed before", done, self.count)
        mine = rank_share(len(lacking), comm.rank(), comm.world())
        total = sum(len(self.shards.layout.ranges[number]) for number in lacking)
        own = lacking[mine.start : mine.stop]
        return have + self._noted(comm.patiently(lambda: self._compute(own, total)))

    def _compute(self, own: list[int], total: int) -> dict[int, list[int]]:
        """This rank's part; on failure of one all end, so that none waits for it."""
        written = {}
        for number, rows, missing in self.extractor.shards(self.shards.layout.ranges, own, total):
            self.missing[number] = missing
            if self._wrote(number, rows, missing):
                written[number] = missing
            else:
                self.unwritten[number] = rows.clone()
        return written

    def _wrote(self, number: int, rows: Tensor, missing: list[int]) -> bool:
        """Store a shard unless the disk is full, which is logged if there is memory for the whole table."""
        if self.full:
            return False
        try:
            self.shards.write(number, rows, missing)
        except OSError as error:
            room, size = Room.of(torch.device("cpu")), 4 * self.shards.layout.rows * self.shards.layout.dim
            if size * room.processes > room.host / 2:
                raise
            reason = write_failure(error) or error
            logger.warning("features are not cached in %s: %s", self.shards.folder.parent, reason)
            self.full = True
        return not self.full

    def _readable(self) -> Tensor:
        """bool ``[N]``, from what all ranks noted."""
        positions = [position for missing in self.missing.values() for position in missing]
        readable = torch.ones(self.shards.layout.rows, dtype=torch.bool)
        readable[comm.gather(torch.tensor(positions, dtype=torch.int64))] = False
        return readable

    def _spread(self, have: Tensor, unwritten: Mapping[int, int]) -> dict[int, int]:
        """Bring every shard to every folder, one at a time. By shard for which one of them has no room, a rank
        that reads it."""
        everywhere, refused = sorted(set(self.leaders)), {}
        for number in range(self.count):
            lacking = [leader for leader in everywhere if not have[leader, number]]
            if number in unwritten or not lacking:
                continue
            source = int(have[:, number].nonzero()[0])
            rows = self._sent(number, source)
            missing = comm.broadcast_object(self.shards.footer(number) if comm.rank() == source else None, source)
            wanted = comm.rank() in lacking
            # Without room in memory either a rank raises: then all of them end.
            if not comm.patiently(partial(self._stored, wanted, number, rows, missing)):
                refused[number] = source
        return _merged(refused.items())

    def _stored(self, wanted: bool, number: int, rows: Tensor, missing: list[int]) -> bool:
        """Whether a shard that this rank wants, if it does, is in its folder now."""
        return not wanted or self._wrote(number, rows, missing)

    def _sent(self, number: int, source: int) -> Tensor:
        if comm.rank() == source:
            return comm.broadcast(self.shards.read(number).clone(), source)
        return comm.broadcast(torch.empty(len(self.shards.layout.ranges[number]), self.shards.layout.dim), source)

    def _copied(self, device: torch.device, holders: Mapping[int, int]) -> Tensor:
        """The whole table; shards that are not in every folder come from the ranks that hold them."""
        layout = self.shards.layout
        table = torch.empty(layout.rows, layout.dim, device=device)
        for number, rows in enumerate(layout.ranges):
            part = table[rows.start : rows.stop]
            if holders.get(number, comm.rank()) == comm.rank():
                part.copy_(self.unwritten[number] if number in self.unwritten else self.shards.read(number))
            if number in holders:
                comm.broadcast(part, holders[number])
        return table


def _merged(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Shards and ranks from what each rank names."""
    return dict(comm.gather(torch.tensor(list(pairs), dtype=torch.int64).view(-1, 2)).tolist())
