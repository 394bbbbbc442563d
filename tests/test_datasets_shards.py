"""Tar archives: their index, reading in place, the order of training, damaged members and archives."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets_kit import DECODER_WARNING
from PIL import Image
from sslbench_plugins.datasets.shards import Shards, ShardsOptions

from sslbench.config.schema import DataOptions
from sslbench.data import loader as loader_module
from sslbench.data.loader import TrainLoader
from sslbench.data.shardindex import expand_braces, find_shards, read_index
from sslbench.data.shards import ShardSource
from sslbench.data.sources import ConcatSource
from sslbench.data.splits import eval_split
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor
from sslbench.errors import DataError
from sslbench.plugin.viewspec import ViewSpec

pytestmark = pytest.mark.filterwarnings(DECODER_WARNING)

CPU = torch.device("cpu")


def _image(number: int, suffix: str = "png", size: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    Image.new("RGB", size or (12 + number % 5, 14), (number, 40, 120)).save(stream, kind)
    return stream.getvalue()


def _write(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _shards(root: Path, count: int = 6, per_shard: int = 10, labels: bool = True) -> list[Path]:
    """Image n is in archive n // per_shard and of class n % 3; its first pixel is n."""
    paths = []
    for shard in range(count):
        members = []
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            members += [(f"a/{number:04d}.cls", f"{number % 3}\n".encode())] if labels else []
            members.append((f"a/{number:04d}.png", _image(number)))
        paths.append(_write(root / f"train-{shard:03d}.tar", members))
    return paths


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ShardSource:
    return ShardSource(_shards(tmp_path_factory.mktemp("shards")))


def _dataset(shards: str | Sequence[str], **options) -> Shards:
    return Shards(ShardsOptions.model_validate({"shards": shards, **options}))


# --- naming archives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("a{9..10}", ["a9", "a10"]),
        ("{x,y}-{0..1}", ["x-0", "x-1", "y-0", "y-1"]),
    ],
)
def test_braces(text, expected):
    assert expand_braces(text) == expected


def test_archives_are_named_by_braces_wildcards_or_a_list(tmp_path):
    paths = _shards(tmp_path, count=3, per_shard=1)
    for named in ([f"{tmp_path}/train-{{000..002}}.tar"], [f"{tmp_path}/*.tar"], [str(path) for path in paths]):
        assert find_shards(named) == paths
    with pytest.raises(DataError, match=r"2 of 5 shards do not exist: .*train-003\.tar"):
        find_shards([f"{tmp_path}/train-{{000..004}}.tar"])
    with pytest.raises(DataError, match=r"1 of 1 shards do not exist: .*\*\.tgz"):
        find_shards([f"{tmp_path}/*.tgz"])


# --- the data set ------------------------------------------------------------------------------------------------


def test_images_labels_and_splits(tmp_path):
    _shards(tmp_path)
    _write(tmp_path / "test.tar", [("x.jpg", _image(7, "jpg")), ("x.cls", b"2")])
    dataset = _dataset(f"{tmp_path}/train-{{000..005}}.tar", test=f"{tmp_path}/test.tar")
    info = dataset.info
    assert (info.classes, info.size, info.splits) == (("0", "1", "2"), None, ("train", "test"))
    assert (info.task, dataset.key) == ("classification", f"shards-{tmp_path.name}")
    train = dataset.split("train")
    assert train.targets.tolist() == [number % 3 for number in range(60)]
    assert train.blocks.tolist() == [number // 10 for number in range(60)]
    assert [int(train.image(number)[0, 0, 0]) for number in range(60)] == list(range(60))
    assert train.describe(23) == f"{tmp_path}/train-002.tar/a/0023.png"
    assert train.image_sizes()[3].tolist() == [14, 15]
    assert dataset.split("test").targets.tolist() == [2]
    assert len(eval_split(dataset, "val", 0.1)[1]) == 6
    with pytest.raises(DataError, match=r"no split 'val' \(it has train, test\)"):
        dataset.split("val")


def test_archives_without_labels(tmp_path):
    _shards(tmp_path, count=2, labels=False)
    dataset = _dataset(f"{tmp_path}/*.tar")
    assert (dataset.info.task, dataset.info.classes, dataset.split("train").targets) == ("unlabelled", (), None)


def test_other_members_are_ignored_and_names_are_only_names(tmp_path):
    path = tmp_path / "odd.tar"
    content = _image(1)
    _write(
        path, [("../../up.png", content), ("/etc/root.PNG", content), ("a.b/c.seg.png", content), ("t.txt", b"")]
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = ShardSource([path])
    assert list(source.names.basenames()) == ["../../up.png", "/etc/root.PNG"]
    assert source.image(1).shape == (3, 14, 13)
    assert [file.name for file in tmp_path.iterdir() if file != path] == [".odd.tar.index.npz"]


def test_images_of_one_size_are_known_to_be(tmp_path):
    _write(tmp_path / "a.tar", [(f"{n}.webp", _image(n, "webp", (16, 16))) for n in range(4)])
    assert _dataset(f"{tmp_path}/a.tar").info.size == 16


def test_fingerprint_follows_contents_labels_and_cuts(tmp_path):
    def fingerprint(folder: str, count: int, per_shard: int, change: bytes | None = None) -> str:
        paths = _shards(tmp_path / folder, count, per_shard)
        if change is not None:
            members = [(f"a/{n:04d}.png", _image(n)) for n in range(per_shard)]
            labels = [(f"a/{n:04d}.cls", change if n == 0 else b"%d" % (n % 3)) for n in range(per_shard)]
            _write(paths[0], members + labels)
        return _dataset(f"{tmp_path}/{folder}/*.tar").fingerprint()

    first = fingerprint("one", 2, 6)
    assert fingerprint("two", 2, 6) == first
    assert fingerprint("same", 2, 6, change=b"0") == first
    assert fingerprint("labels", 2, 6, change=b"2") != first
    assert fingerprint("cuts", 3, 4) != first


# --- the index ---------------------------------------------------------------------------------------------------


def test_the_index_is_kept_beside_the_archive_until_that_changes(tmp_path):
    (path,) = _shards(tmp_path, count=1)
    index = read_index(path)
    kept = tmp_path / ".train-000.tar.index.npz"
    with tarfile.open(path) as archive:
        offsets = [member.offset_data for member in archive if member.name.endswith("png")]
    assert index.offsets.tolist() == offsets
    before = kept.stat().st_mtime_ns
    again = read_index(path)
    assert kept.stat().st_mtime_ns == before
    assert again.names == index.names
    assert all(np.array_equal(a, b) for a, b in zip(again[1:], index[1:], strict=True))
    _write(path, [("only.png", _image(3))])
    assert read_index(path).names == ("only.png",)
    os.utime(path, ns=(1, 1))
    assert read_index(path).names == ("only.png",)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    (path,) = _shards(tmp_path, count=1)
    names = read_index(path).names
    kept = tmp_path / ".train-000.tar.index.npz"
    whole = kept.read_bytes()
    kept.write_bytes(damage or whole[: len(whole) // 2])
    assert read_index(path).names == names
    assert len(kept.read_bytes()) == len(whole)


def test_the_index_goes_to_the_cache_where_the_folder_cannot_be_written(tmp_path):
    (path,) = _shards(tmp_path, count=1)
    (tmp_path / ".train-000.tar.index.npz").mkdir()
    names = read_index(path).names
    (kept,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npz")
    before = kept.stat().st_mtime_ns
    assert read_index(path).names == names
    assert kept.stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*partial"))


def test_many_may_index_one_archive_at_once(tmp_path):
    (path,) = _shards(tmp_path, count=1, per_shard=200)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read_index, [path] * 16))
    assert len({index.names for index in found}) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [".train-000.tar.index.npz", "train-000.tar"]


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_archives_are_refused(tmp_path, mode, kind):
    path = _write(tmp_path / "a.tar", [("0.png", _image(0))], mode)
    with pytest.raises(DataError, match=rf"a\.tar is compressed \({kind}\).*unpack"):
        read_index(path)


def test_what_is_no_archive_or_has_wrong_labels_is_refused(tmp_path):
    whole = _shards(tmp_path, count=1)[0].read_bytes()
    cut = tmp_path / "cut.tar"
    for length in (1300, 1700, 2048, 3072):  # in a header, in an image, between members
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar is not a whole tar archive"):
            read_index(cut)
    cut.write_bytes(b"something else" * 99)
    with pytest.raises(DataError, match=r"cut\.tar is not a whole tar archive"):
        read_index(cut)
    wrong = _write(tmp_path / "wrong.tar", [("0.png", _image(0)), ("0.cls", b"cat")])
    with pytest.raises(DataError, match=r"0\.cls holds b'cat', not a class number"):
        read_index(wrong)
    some = _write(tmp_path / "some.tar", [("0.png", _image(0)), ("0.cls", b"1"), ("1.png", _image(1))])
    with pytest.raises(DataError, match=r"1 of 2 images have no label: .*some\.tar/1\.png"):
        ShardSource([some])
    none = _write(tmp_path / "none.tar", [("0.txt", b"")])
    with pytest.raises(DataError, match="hold no"):
        ShardSource([none])


def test_a_test_class_without_training_images_is_refused(tmp_path):
    _shards(tmp_path, count=1)
    _write(tmp_path / "test.tar", [("x.png", _image(7)), ("x.cls", b"3")])
    with pytest.raises(DataError, match="class 3 of split 'test'"):
        _dataset(f"{tmp_path}/train-000.tar", test=f"{tmp_path}/test.tar").split("test")


# --- training ----------------------------------------------------------------------------------------------------


def _loader(source: ShardSource, **kwargs) -> TrainLoader:
    views = ViewExecutor([ViewSpec(size=8)], size=8, mean=(0.5,) * 3, std=(0.25,) * 3, device=CPU)
    store = open_store(
        source, DataOptions(max_unreadable=kwargs.pop("max_unreadable", 0)), CPU, lambda _line: None
    )
    return TrainLoader(source, store, views, **({"seed": 3, "global_batch": 10, "workers": 0} | kwargs))


def _order(loader: TrainLoader, epoch: int) -> torch.Tensor:
    return loader._permutation(epoch)


def test_an_epoch_visits_a_few_archives_at_a_time_and_every_image_once(source, monkeypatch):
    monkeypatch.setattr(loader_module, "OPEN_BLOCKS", 2)
    loader = _loader(source)
    visits = []
    for epoch in range(6):
        order = _order(loader, epoch)
        assert sorted(order.tolist()) == list(range(60))
        windows = [tuple(sorted(set(part.tolist()))) for part in source.blocks[order].split(20)]
        assert [len(window) for window in windows] == [2, 2, 2]
        visits.append(tuple(windows))
    assert len(set(visits)) > 1, "archives meet others in other epochs"
    assert torch.equal(_order(_loader(source), 4), _order(loader, 4))
    assert not torch.equal(_order(_loader(source, seed=4), 4), _order(loader, 4))


def test_an_augmented_pass_visits_archives_as_an_epoch_does(source, monkeypatch):
    monkeypatch.setattr(loader_module, "OPEN_BLOCKS", 2)
    order = torch.cat([batch.index for batch in _loader(source).images.augmented(0)])
    assert sorted(order.tolist()) == list(range(60))
    assert [len(source.blocks[part].unique()) for part in order.split(20)] == [2, 2, 2]
    assert not torch.equal(order, _order(_loader(source), 0))


def test_images_are_well_mixed_within_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "OPEN_BLOCKS", 4)

    class Blocks(ShardSource):
        def __init__(self) -> None:
            self._targets = None

        def __len__(self) -> int:
            return 8000

        @property
        def blocks(self) -> torch.Tensor:
            return torch.arange(8000) // 1000

    loader = object.__new__(TrainLoader)
    loader.seed, loader.num_images = 1, 8000
    loader._blocks = loader_module._numbered(Blocks().blocks)
    order = loader._draw_permutation(0)
    first, second = order[:4000], order[4000:]
    assert len(first.div(1000, rounding_mode="floor").unique()) == 4
    assert len(second.div(1000, rounding_mode="floor").unique()) == 4
    for window in (first, second):
        ranks = window.argsort().argsort().double()
        correlation = torch.corrcoef(torch.stack([ranks, torch.arange(4000).double()]))[0, 1]
        assert abs(correlation) < 0.06, "a random permutation of 4,000 has |r| < 0.06 at four sigma"
        shares = torch.bincount(window[:400].div(1000, rounding_mode="floor"), minlength=8)
        assert shares[shares > 0].tolist() == pytest.approx([100] * 4, abs=35), "each batch mixes the archives"


def test_a_subset_of_images_and_a_last_small_window(source, monkeypatch):
    monkeypatch.setattr(loader_module, "OPEN_BLOCKS", 3)
    indices = torch.cat([torch.arange(3, 20), torch.arange(30, 60)])  # archives 0, 1, 3, 4, 5: windows of 3 and 2
    loader = _loader(source, indices=indices)
    order = indices[_order(loader, 0)]
    assert sorted(order.tolist()) == indices.tolist()
    changes = source.blocks[order]
    first = set(changes[:17].tolist())
    assert len(first) <= 3


def test_resume_and_ranks_do_not_change_the_order(source):
    whole = [batch.index for batch in _loader(source).batches(0, 12)]
    rest = [batch.index for batch in _loader(source).batches(7, 12)]
    assert all(torch.equal(a, b) for a, b in zip(whole[7:], rest, strict=True))
    shares = [[b.index for b in _loader(source, rank=rank, world=2).batches(7, 12)] for rank in range(2)]
    for step, parts in enumerate(zip(*shares, strict=True)):
        assert torch.equal(torch.cat(parts), rest[step])


def test_worker_processes_read_the_same_images(source):
    source.image(0)  # the descriptor is open before the processes fork
    inline, parallel = (list(_loader(source, workers=workers).batches(2, 6)) for workers in (0, 2))
    for a, b in zip(inline, parallel, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.views[0].images, b.views[0].images)


def test_more_archives_than_open_files(tmp_path, monkeypatch):
    from sslbench.data import shards

    source = ShardSource(_shards(tmp_path, count=70, per_shard=1))
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: int(source.image(number)[0, 0, 0]), [*range(70), *range(70)]))
    assert found == [*range(70), *range(70)]
    if opened:
        assert len(os.listdir("/proc/self/fd")) <= opened + shards._OPEN_FILES


def test_a_damaged_member_is_named_and_replaced_on_request(tmp_path):
    members = [(f"{n}.png", _image(n)) for n in range(20)]
    members[4] = ("4.png", b"")
    members[9] = ("9.png", members[9][1][:40])
    source = ShardSource([_write(tmp_path / "a.tar", members)])
    with pytest.raises(DataError, match=r"(?s)unreadable.*a\.tar/"):
        list(_loader(source).batches(0, 2))
    loader = _loader(source, max_unreadable=2)
    shown = torch.cat([batch.index for batch in loader.batches(0, 2)])
    assert set(loader.store.unreadable.reasons) == {4, 9}
    assert sorted(shown.tolist()) == sorted([*(n for n in range(20) if n not in (4, 9)), 5, 10])


def test_an_archive_that_becomes_shorter_is_an_unreadable_image(tmp_path):
    (path,) = _shards(tmp_path, count=1)
    source = ShardSource([path])
    os.truncate(path, 4000)
    with pytest.raises(DataError, match=r"a/0009\.png: the archive has become shorter"):
        source.image(9)
    path.unlink()
    assert int(source.image(0)[0, 0, 0]) == 0, "what is open stays open"


def test_training_and_validation_archives_together_keep_their_blocks(source):
    both = ConcatSource(source, source)
    assert both.blocks.tolist() == [*source.blocks.tolist(), *(source.blocks + 6).tolist()]
