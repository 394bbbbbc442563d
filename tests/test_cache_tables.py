"""Small tables about files: taken once, taken again when a file has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets_kit import write_image

from sslbench.data import encoded, filesets
from sslbench.data.encoded import FileSource
from sslbench.data.entry import default_folder
from sslbench.data.filesets import files_digest
from sslbench.data.imagefile import digest_files
from sslbench.data.paths import find_images


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (encoded, filesets):
        monkeypatch.setattr(module, "WORTH_KEEPING", 3)
    for number in range(4):
        write_image(tmp_path / f"images/{number}.png", colour=number)
    return tmp_path / "images"


def _tables() -> list[Path]:
    return sorted((default_folder() / "tables").glob("*.npz"))


def _sizes(root: Path) -> list[list[int]]:
    source = FileSource(find_images(root), None)
    return [list(pair) for pair in source.image_sizes().tolist()]


def test_headers_are_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _sizes(root) == [[12, 12]] * 4
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "header", None)
        assert _sizes(root) == [[12, 12]] * 4
    write_image(root / "2.png", size=(9, 7))
    assert _sizes(root)[2] == [7, 9]


def test_a_fingerprint_is_taken_once_and_follows_contents(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"train": find_images(root)}
    wanted = digest_files(tables)
    assert files_digest(tables) == wanted
    by_name = files_digest(tables, folders=False)
    with monkeypatch.context() as patch:
        patch.setattr(filesets, "digest_files", None)
        assert files_digest(tables) == wanted
        assert files_digest(tables, folders=False) == by_name
    (root / "1.png").touch()  # a new date alone is looked into, and changes nothing
    assert files_digest(tables) == wanted
    write_image(root / "1.png", colour=99)
    assert files_digest(tables) == digest_files(tables) != wanted


def test_a_damaged_table_is_made_again(root: Path) -> None:
    _sizes(root)
    (table,) = _tables()
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    assert _sizes(root) == [[12, 12]] * 4
    table.write_bytes(b"")
    assert _sizes(root) == [[12, 12]] * 4


def test_a_file_that_changes_meanwhile_leaves_no_table(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FileSource.header

    def meddling(self: FileSource, index: int) -> tuple[int, int]:
        write_image(root / "3.png", size=(8, 8))
        return original(self, index)

    monkeypatch.setattr(FileSource, "header", meddling)
    _sizes(root)
    assert not _tables()


def test_a_cache_that_cannot_be_written_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "file"))
    assert _sizes(root) == [[12, 12]] * 4


def test_few_files_are_not_worth_a_table(root: Path) -> None:
    (root / "0.png").unlink()
    (root / "1.png").unlink()
    assert _sizes(root) == [[12, 12]] * 2
    assert not _tables()
