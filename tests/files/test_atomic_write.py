import os
import stat

import pytest

from trimtab.errors import TrimtabError
from trimtab.files import atomic_write
from trimtab.files.atomic_write import check_target, write_atomically


@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_changes_nothing(tmp_path, monkeypatch, there_before, step, kind):
    path = tmp_path / "s.safetensors"
    if there_before:
        path.write_bytes(b"old")

    def stop(*_):
        raise kind

    monkeypatch.setattr(atomic_write.os, step, stop)
    with pytest.raises(kind):
        write_atomically(path, b"new" * 1000)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"] * there_before
    if there_before:
        assert path.read_bytes() == b"old"


def test_a_written_file_is_an_ordinary_one(tmp_path):
    path = tmp_path / "s.safetensors"
    before = os.umask(0o027)
    try:
        write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(list(tmp_path.iterdir())) == 1


def test_checking_beforehand(tmp_path):
    check_target(tmp_path / "s.safetensors", ".safetensors")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.safetensors").mkdir()
    bad = {
        "nowhere/s.safetensors": "folder must exist",
        "file/s.safetensors": "folder must exist",
        "s.pt": r"named \*\.safetensors",
        "folder.safetensors": "is a folder",
    }
    for name, reason in bad.items():
        with pytest.raises(TrimtabError, match=reason):
            check_target(tmp_path / name, ".safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.safetensors"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    with pytest.raises(TrimtabError, match="writable"):
        check_target(folder / "s.safetensors", ".safetensors")
