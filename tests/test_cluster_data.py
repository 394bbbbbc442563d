"""Data on clusters: several processes, CPU quotas, small shared memory, damage, other people's folders."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from sslbench import comm
from sslbench.config.schema import DataOptions
from sslbench.cores import cpu_quota, own_cores, processes_here
from sslbench.data import entry, kept, shardindex
from sslbench.data.decoding import default_workers, shared_pixels
from sslbench.data.encoded import FileSource
from sslbench.data.paths import find_images
from sslbench.data.shards import ShardSource
from sslbench.data.store import DecodedStore, ResidentStore, open_store
from sslbench.errors import DataError, LaunchError, PreemptedError

FORKED = multiprocessing.get_context("fork")
TESTS = Path(__file__).parent
Work = Callable[[Path], Any]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sslbench"


def images(folder: Path, count: int = 16, side: int = 12) -> Path:
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number:02}.png")
    return folder / "images"


# Cores


def test_a_rank_takes_its_share_of_the_cores() -> None:
    alone = own_cores({})
    assert own_cores({"LOCAL_WORLD_SIZE": "2"}) == max(1, alone // 2)
    assert own_cores({"LOCAL_WORLD_SIZE": "1000"}) == 1
    slurm = {"SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_TASKS_PER_NODE": "4,8(x1)"}
    assert processes_here(slurm) == 8
    assert processes_here({**slurm, "LOCAL_WORLD_SIZE": "4"}) == 4
    assert processes_here({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}) == 1


def test_a_slurm_task_that_was_given_cores_does_not_divide_them_again() -> None:
    task = {"SLURM_STEP_NUM_TASKS": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "1"}
    assert own_cores(task) == 1
    assert own_cores({**task, "SLURM_CPUS_PER_TASK": "64"}) == own_cores({})
    launcher = {"SLURM_STEP_NUM_TASKS": "1", "LOCAL_WORLD_SIZE": "1000", "SLURM_CPUS_PER_TASK": "64"}
    assert own_cores(launcher) == 1


def test_decoding_workers_keep_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslbench.cores.allowed_cores", lambda: 64)
    monkeypatch.setattr("sslbench.cores.cpu_quota", lambda: 6)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert default_workers() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert default_workers() == 2


def test_the_smallest_quota_of_our_groups_holds(tmp_path: Path) -> None:
    member = tmp_path / "member"
    member.write_text("0::/job_7/step_0\n4:cpu,cpuacct:/old\n")
    (tmp_path / "job_7/step_0").mkdir(parents=True)
    (tmp_path / "job_7/cpu.max").write_text("250000 100000")
    (tmp_path / "job_7/step_0/cpu.max").write_text("max 100000")
    assert cpu_quota(tmp_path, member) == 3
    (tmp_path / "cpu,cpuacct/old").mkdir(parents=True)
    (tmp_path / "cpu,cpuacct/old/cpu.cfs_quota_us").write_text("200000")
    (tmp_path / "cpu,cpuacct/old/cpu.cfs_period_us").write_text("100000")
    assert cpu_quota(tmp_path, member) == 2
    (tmp_path / "cpu,cpuacct/old/cpu.cfs_quota_us").write_text("-1")
    assert cpu_quota(tmp_path, member) == 3


# Shared memory

DECODE = """
import torch
from test_decoding import PhotoSource, executor, loader, pixels
from sslbench.plugin.viewspec import ViewSpec
torch.set_num_threads(1)
views = executor(ViewSpec(size=96))
both = [torch.cat([pixels(b) for b in loader(PhotoSource(40), views, workers=w).batches(0, 2)]) for w in (2, 0)]
print(torch.equal(*both))
"""


@pytest.mark.slow
def test_workers_need_no_room_in_dev_shm() -> None:
    """Views of two batches take 3 MiB, /dev/shm has 64 KiB."""
    script = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {sys.executable} -c '{DECODE}'"
    done = subprocess.run(
        ["unshare", "--mount", "--user", "--map-root-user", "sh", "-c", script],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this system gives a process no mounts of its own")
    assert done.stdout == "True\n", done.stderr


def test_where_processes_are_not_forked_a_small_dev_shm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda: "spawn")
    monkeypatch.setattr("sslbench.data.decoding._SHM", "/proc")  # a file system without room
    with pytest.raises(DataError, match="decoding processes hand over images in 2 MiB") as caught:
        shared_pixels(2, 1 << 20)
    assert "--shm-size" in str(caught.value.hint)
    assert "data.workers=0" in str(caught.value.hint)


# Folders


def homeless(folder: Path) -> None:
    """A user without a home, whose temporary folder is ``folder``."""
    os.environ.pop("XDG_CACHE_HOME", None)
    entry.Path.home = _no_home  # type: ignore[method-assign]
    entry.tempfile.tempdir = str(folder)


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def in_a_process(work: Callable[..., object], *arguments: object) -> object:
    """What work returns, or the error it raises, in a process whose changes do not matter."""

    def run() -> None:
        try:
            answers.put(work(*arguments))
        except Exception as error:  # noqa: BLE001
            answers.put(error)

    answers = FORKED.Queue()
    process = FORKED.Process(target=run)
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    return answer


def folder_of_the_homeless(folder: Path) -> Path:
    homeless(folder)
    return entry.default_folder()


def test_the_folder_of_a_user_without_a_home_is_private(tmp_path: Path) -> None:
    wanted = tmp_path / f"sslbench-{os.getuid()}"
    assert in_a_process(folder_of_the_homeless, tmp_path) == wanted
    assert wanted.stat().st_mode & 0o777 == 0o700
    wanted.chmod(0o777)
    assert in_a_process(folder_of_the_homeless, tmp_path) == wanted
    assert wanted.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("plant", ["another user's", "a link", "a file"])
def test_what_others_have_put_there_is_not_used(plant: str, tmp_path: Path) -> None:
    folder = tmp_path / f"sslbench-{os.getuid()}"
    if plant == "another user's":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        folder.mkdir()
        os.chown(folder, 12345, 12345)
    elif plant == "a link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.touch()
    error = in_a_process(folder_of_the_homeless, tmp_path)
    assert isinstance(error, DataError)
    assert "is not a folder of user" in str(error)


# Tables and indices


def table_of(cache: Path, seconds: float, made: Any) -> list[int]:
    def make() -> np.ndarray[Any, np.dtype[np.int64]]:
        made.put(os.getpid())
        time.sleep(seconds)
        return np.arange(5)

    return kept.kept("numbers", lambda: "revision", make).tolist()


def started(work: Callable[..., object], *arguments: object) -> Any:
    process = FORKED.Process(target=work, args=arguments)
    process.start()
    return process


def emptied(queue: Any) -> list[Any]:
    found = []
    while not queue.empty():
        found.append(queue.get())
    return found


def test_of_processes_that_want_a_table_one_makes_it(cache: Path) -> None:
    made = FORKED.SimpleQueue()
    processes = [started(table_of, cache, 1.0, made) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(emptied(made)) == 1


@pytest.mark.parametrize("damage", ["bit", "cut", "other version"])
def test_a_damaged_table_is_made_again(damage: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FORKED.SimpleQueue()
    table_of(cache, 0, made)
    (file,) = (cache / "tables").glob("numbers-*.npz")
    content = bytearray(file.read_bytes())
    if damage == "bit":
        place = content.index(np.arange(5).tobytes())
        content[place] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        os.truncate(file, len(content) // 2)
    else:
        monkeypatch.setattr(kept, "TABLE_VERSION", kept.TABLE_VERSION + 1)
    assert table_of(cache, 0, made) == list(range(5))
    assert table_of(cache, 0, made) == list(range(5))
    assert len(emptied(made)) == 2


def shard(path: Path, count: int) -> Path:
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            stream = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(stream, "PNG")
            info = tarfile.TarInfo(f"{number:04}.png")
            info.size = stream.tell()
            archive.addfile(info, io.BytesIO(stream.getvalue()))
    return path


def index_slowly(shards: list[Path], scanned: Any) -> None:
    scan = shardindex._scan

    def slow(path: Path) -> shardindex.ShardIndex:
        scanned.put(path)
        time.sleep(0.2)
        return scan(path)

    shardindex._scan = slow
    assert len(ShardSource(shards)) == 15


def test_of_processes_that_open_shards_one_indexes_them(cache: Path, tmp_path: Path) -> None:
    shards = [shard(tmp_path / f"{number}.tar", 5) for number in range(3)]
    scanned = FORKED.SimpleQueue()
    processes = [started(index_slowly, shards, scanned) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(emptied(scanned)) == shards
    (index,) = tmp_path.glob(".1.tar.index.npz")
    content = bytearray(index.read_bytes())
    content[content.index(shardindex.read_index(shards[1]).offsets.tobytes())] ^= 1
    index.write_bytes(content)
    process = started(index_slowly, shards, scanned)
    process.join(60)
    assert process.exitcode == 0
    assert emptied(scanned) == shards[1:2]


def test_without_a_place_for_locks_shards_open_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(ShardSource([shard(tmp_path / "a.tar", 4)])) == 4
    assert kept.kept("numbers", lambda: "r", lambda: np.arange(3)).tolist() == [0, 1, 2]


# Ranks

RANKS_TIMEOUT_S = 3


def rank_process(rank: int, folder: Path, work: Work) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=RANKS_TIMEOUT_S),
    )
    try:
        result = work(folder)
    except Exception as error:  # noqa: BLE001
        result = type(error).__name__, str(error)
    torch.save(result, folder / f"{rank}.pt")


def on_two_ranks(folder: Path, work: Work) -> list[Any]:
    mp.spawn(rank_process, (folder, work), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def take_longer_than_a_collective_may(folder: Path) -> tuple[int, list[int]]:
    found = comm.patiently(lambda: time.sleep(comm.rank() * 3 * RANKS_TIMEOUT_S) or comm.rank())
    return found, comm.gather(torch.tensor([found])).tolist()


def fail_on_one(folder: Path) -> None:
    def work() -> None:
        if comm.rank() == 1:
            raise DataError("its disk is full")
        time.sleep(0.5)

    comm.patiently(work)


def be_stopped_on_one(folder: Path) -> None:
    def work() -> None:
        if comm.rank() == 1:
            raise PreemptedError("stopped by SIGTERM")

    comm.patiently(work)


def test_ranks_wait_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    assert on_two_ranks(tmp_path, take_longer_than_a_collective_may) == [(0, [0, 1]), (1, [0, 1])]


def test_what_fails_on_one_rank_ends_all_with_its_reason(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, fail_on_one)
    assert first == (LaunchError.__name__, "rank 1 has failed: its disk is full")
    assert second == (DataError.__name__, "its disk is full")


@pytest.mark.slow
def test_a_rank_that_is_stopped_stops_all_alike(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, be_stopped_on_one)
    assert first[0] == second[0] == PreemptedError.__name__


def open_with_a_cache_that_one_cannot_write(folder: Path) -> tuple[str, list[str], int]:
    if comm.rank() == 1:
        os.environ["XDG_CACHE_HOME"] = str(folder / "a file")
    source, lines = FileSource(find_images(folder / "images"), None), list[str]()
    store = open_store(source, DataOptions(resident="mmap"), torch.device("cpu"), lines.append)
    assert isinstance(store, ResidentStore)
    return type(store).__name__, lines, int(store.pixels.sum())


def open_as_workers_do_where_one_has_no_cache(folder: Path) -> str:
    if comm.rank() == 1:
        os.environ["XDG_CACHE_HOME"] = str(folder / "a file")
    import sslbench.data.placing as placing
    import sslbench.data.store as store_module

    placing.WORTH_KEEPING = store_module.WORTH_KEEPING = 1
    room = placing.Room(host=40_000, processes=2)  # the pixels fit once, not twice
    placing.Room.of = classmethod(lambda cls, device: room)  # type: ignore[assignment,method-assign]
    source = FileSource(find_images(folder / "images"), None)
    return type(open_store(source, DataOptions(), torch.device("cpu"), print)).__name__


def test_where_one_rank_has_no_cache_all_hold_the_same_pixels(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a file").touch()
    images(tmp_path)
    first, second = on_two_ranks(tmp_path, open_with_a_cache_that_one_cannot_write)
    assert first[0] == second[0] == "ResidentStore"
    assert first[2] == second[2]
    assert any("could not be kept for process 1 of 2" in line for line in first[1])


@pytest.mark.slow
def test_where_one_rank_has_to_decode_all_decode(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a file").touch()
    images(tmp_path, count=40)
    assert on_two_ranks(tmp_path, open_as_workers_do_where_one_has_no_cache) == [DecodedStore.__name__] * 2
