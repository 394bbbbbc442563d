"""Files that were made to do harm: images, archives, tables, weights and YAML."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sslbench.config.compose import read_config_file
from sslbench.config.tree import read_yaml
from sslbench.data.arrays import read_arrays
from sslbench.data.cifar import read_pickle
from sslbench.data.downloads import DownloadOptions, require_files
from sslbench.data.imagefile import decode_image, digest_files, image_size, read_bytes
from sslbench.data.paths import find_images
from sslbench.data.shardindex import read_index
from sslbench.data.shards import ShardSource
from sslbench.engine.checkpoint import load_tensors
from sslbench.engine.foreign import read_weights
from sslbench.errors import CheckpointError, ConfigError, DataError

MIB = 1 << 20


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, (str(self.mark),)


def encoded(image: Image.Image, kind: str, **options: object) -> bytearray:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return bytearray(file.getvalue())


def jpeg_bomb() -> bytes:
    """A few hundred bytes that announce 50,000 x 50,000 pixels: 7.5 GB."""
    content = encoded(Image.new("RGB", (16, 16)), "JPEG")
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (50_000).to_bytes(2, "big") * 2
    return bytes(content)


def progressive_bomb() -> bytes:
    content = encoded(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    frame = content.index(b"\xff\xc2")
    content[frame + 5 : frame + 9] = (65_500).to_bytes(2, "big") * 2
    return bytes(content)


def png_bomb() -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def gif_bomb() -> bytes:
    content = encoded(Image.new("L", (2, 2)), "GIF")
    content[6:10] = b"\xff\xff\xff\xff"
    place = content.rindex(b",")  # the frame's own size
    content[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    return bytes(content)


def postscript(mark: Path) -> bytes:
    """Pillow would hand it to Ghostscript."""
    program = f"({mark}) (w) file closefile showpage"
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{program}\n%%EOF\n".encode()


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_png_with_wrong_bits_is_an_error_and_not_the_end_of_the_process(name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    good = encoded(Image.fromarray(noise), "PNG")
    for place in range(50, len(good) - 20, 40):
        content = good.copy()
        content[place] ^= 1
        with suppress(DataError):  # a wrong check sum may be passed over
            assert decode_image(np.frombuffer(content, np.uint8), name).shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.bmp"])
@pytest.mark.parametrize("bomb", [jpeg_bomb, progressive_bomb, png_bomb, gif_bomb])
def test_a_picture_of_gigabytes_is_an_unreadable_image(bomb: Callable[[], bytes], name: str) -> None:
    content = np.frombuffer(bytearray(bomb()), np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="cannot read image"):
        decode_image(content, name)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024  # kibibytes


def test_the_bomb_would_go_off_without_the_limit() -> None:
    """What torchvision would have allocated: the test above must be able to fail."""
    header = jpeg_bomb()
    with pytest.raises(DataError, match="50000x50000 pixels are more than"):
        decode_image(np.frombuffer(bytearray(header), np.uint8), "a.jpg")


def test_usual_images_are_still_read() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    for kind, name in (
        ("PNG", "a.png"),
        ("PNG", "wrong.jpg"),
        ("WEBP", "a.webp"),
        ("BMP", "a.bmp"),
        ("PPM", "a.ppm"),
    ):
        content = encoded(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
        image = decode_image(np.frombuffer(content, np.uint8), name)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels), name
    for progressive in (False, True):
        content = encoded(
            Image.fromarray(pixels), "JPEG", progressive=progressive, comment=b"\xff\xc0 not a frame"
        )
        assert decode_image(np.frombuffer(content, np.uint8), "a.jpg").shape == (3, 9, 7)


def test_no_image_starts_a_postscript_interpreter(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(postscript(tmp_path / "mark"))
    with pytest.raises(DataError, match="format is not known"):
        decode_image(read_bytes(file), str(file))
    assert image_size(file) == (0, 0)
    assert not (tmp_path / "mark").exists()


def test_devices_and_pipes_are_no_images(tmp_path: Path) -> None:
    """Reading one never ends."""
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jpg")
    table = find_images(tmp_path)
    assert len(table) == 2
    for path in table[:]:
        with pytest.raises(DataError, match="no regular file"):
            read_bytes(path)
        assert image_size(path) == (0, 0)
    with pytest.raises(OSError, match="no regular file"):
        digest_files({"train": table})


def test_links_that_lead_up_are_not_followed_for_ever(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
        for number in range(3):
            (tmp_path / name / f"up{number}").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path / "a")  # links to other folders are
    assert sorted(find_images(tmp_path).names()) == ["a/x.png", "b/x.png", "c/x.png"]


def test_yaml_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(yaml.YAMLError):
        read_yaml(f"!!python/object/apply:os.mkdir ['{mark}']")
    assert not mark.exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "- " * 100_000 + "1", "? " * 100_000, "{a: " * 60 + "1" + "}" * 60]
)
def test_deep_yaml_is_refused_and_not_a_crash(text: str, tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text(text)
    words = ["config", "--method", "simclr", "--config", str(file)]
    program = f"import sys; from sslbench.cli import run; sys.exit(run({words!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr  # -11 is a segmentation fault
    assert "not valid YAML" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]),
        "a: &a [*a]",
        "a: &a {b: *a}",
    ],
    ids=["billion laughs", "list in itself", "mapping in itself"],
)
def test_yaml_that_grows_without_end_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_config_file(file)


@pytest.mark.parametrize("reader", [load_tensors, read_weights])
def test_weights_run_nothing(reader: Callable[[Path], object], tmp_path: Path) -> None:
    for legacy in (False, True):
        file, mark = tmp_path / f"weights-{legacy}.pt", tmp_path / "mark"
        torch.save({"w": Harmful(mark)}, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError):
            reader(file)
        assert not mark.exists()


def test_compressed_weights_are_refused(tmp_path: Path) -> None:
    """A thousandth of the size on disk."""
    small, bomb = tmp_path / "small.pt", tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(MIB)}, small)
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < MIB
    assert load_tensors(small)["w"].shape == (MIB,)
    with pytest.raises(CheckpointError, match="compressed"):
        load_tensors(bomb)


def test_tables_hold_no_objects_and_are_not_compressed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.savez(tmp_path / "objects.npz", table=np.array([Harmful(mark)], object))
    np.savez_compressed(tmp_path / "bomb.npz", table=np.zeros(100 * MIB, np.uint8))
    (tmp_path / "text.npz").write_bytes(b"PK\x03\x04 nothing")
    for name in ("objects", "bomb", "text"):
        with pytest.raises(ValueError, match=r"Object|compressed|damaged"):
            read_arrays(tmp_path / f"{name}.npz")
    assert not mark.exists()


def test_a_table_that_announces_more_than_it_has_is_damaged(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("table.npy", header.getvalue() + bytes(80))
    with pytest.raises(ValueError, match=r"damaged|reshape|Failed"):
        read_arrays(tmp_path / "huge.npz")


def make_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def test_an_index_that_lies_beside_foreign_shards_cannot_lead_out_of_them(tmp_path: Path) -> None:
    photo = bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    shard = make_shard(tmp_path / "train-0.tar", {"a.png": photo, "a.cls": b"1"})
    honest = read_index(shard)
    file = tmp_path / ".train-0.tar.index.npz"
    assert file.is_file()
    for key, value in {"sizes": 1 << 45, "offsets": -(1 << 40), "labels": 10**9}.items():
        arrays = read_arrays(file) | {key: np.array([value], np.int64)}
        np.savez(file, **arrays)
        again = read_index(shard)
        assert [part.tolist() for part in again[1:]] == [part.tolist() for part in honest[1:]], key
    source = ShardSource([shard])
    assert bytes(source.encoded(0)) == photo


def test_a_class_number_does_not_make_a_billion_classes(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "train-0.tar", {"a.png": b"x", "a.cls": b"999999999"})
    with pytest.raises(DataError, match="not a class number"):
        read_index(shard)


def test_members_of_shards_are_never_written(tmp_path: Path) -> None:
    photo = bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    names = ["../../escaped.png", f"{tmp_path}/absolute.png", "a.png"]
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    source = ShardSource([make_shard(folder / "x.tar", dict.fromkeys(names, photo))])
    for index in range(len(source)):
        assert source.image(index).shape == (3, 8, 8)
    assert {path.name for path in tmp_path.rglob("*.png")} == set()


def hostile_tar(path: Path, kind: str, victim: Path) -> None:
    with tarfile.open(path, "w") as archive:
        about = tarfile.TarInfo({"absolute": str(victim), "dots": f"../{victim.name}"}.get(kind, "inside"))
        if kind in ("symlink", "hardlink"):
            about.type = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE
            about.linkname = str(victim.parent)
        if kind == "device":
            about.type, about.devmajor, about.devminor = tarfile.CHRTYPE, 1, 5
        if kind == "fifo":
            about.type = tarfile.FIFOTYPE
        content = b"owned" if about.isreg() else b""
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content))
        if kind == "symlink":
            through = tarfile.TarInfo(f"inside/{victim.name}")
            through.size = 5
            archive.addfile(through, io.BytesIO(b"owned"))


@pytest.mark.parametrize("kind", ["absolute", "dots", "symlink", "hardlink", "device", "fifo"])
def test_a_downloaded_archive_stays_in_its_folder(kind: str, tmp_path: Path) -> None:
    from torchvision.datasets.utils import extract_archive

    root, victim = tmp_path / "root", tmp_path / "victim"
    archive = tmp_path / "data.tar"
    hostile_tar(archive, kind, victim)
    with pytest.raises(DataError):  # in any case the files are not there
        require_files(
            "toy",
            DownloadOptions(root=root, download=True),
            "folder",
            ["file"],
            lambda folder: extract_archive(str(archive), str(folder)),
        )
    assert not victim.exists()
    assert all(path.is_dir() or path.is_file() for path in root.rglob("*"))
    assert not [path for path in root.rglob("*") if path.is_symlink()]


def test_the_pickles_of_cifar_hold_data_alone(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    rows = np.arange(6, dtype=np.uint8).reshape(2, 3)
    good, bad, objects = (tmp_path / name for name in ("good", "bad", "objects"))
    good.write_bytes(pickle.dumps({"data": rows}, protocol=2))
    bad.write_bytes(pickle.dumps({"data": Harmful(mark)}, protocol=2))
    objects.write_bytes(pickle.dumps({"data": np.array([None])}, protocol=2))
    assert read_pickle(good)["data"].tolist() == rows.tolist()
    for file in (bad, objects):
        with pytest.raises(DataError, match="does not contain"):
            read_pickle(file)
    assert not mark.exists()
