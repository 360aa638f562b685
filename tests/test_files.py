import os
from pathlib import Path

import pytest

from fxprune.errors import InputError
from fxprune.files import check_writable, replacing


def test_check_writable_accepts_a_new_file_and_creates_nothing(tmp_path: Path) -> None:
    assert check_writable(str(tmp_path / "new.onnx")) == tmp_path / "new.onnx"
    assert list(tmp_path.iterdir()) == []


def test_check_writable_leaves_an_existing_file_alone(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("content")
    check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "content"


def test_check_writable_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path, f"cannot write '{tmp_path}': it is a folder; give the name of a file"),
        (
            tmp_path / "no" / "x",
            f"cannot write '{tmp_path}/no/x': the folder '{tmp_path}/no' does not exist; create it first",
        ),
        (tmp_path / "file" / "x", f"cannot write '{tmp_path}/file/x': '{tmp_path}/file' is not a folder"),
    ]:
        with pytest.raises(InputError) as caught:
            check_writable(path)
        assert str(caught.value) == message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_check_writable_refuses_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match=r"takes no new file \(Permission denied\)"):
            check_writable(tmp_path / "x")
    finally:
        tmp_path.chmod(0o700)


def test_check_writable_refuses_a_folder_that_takes_no_file() -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("needs /proc, a folder in which nobody can create a file")
    with pytest.raises(InputError, match=r"cannot write '/proc/self/x': the folder '/proc/self' takes no new file \("):
        check_writable("/proc/self/x")


def test_replacing_moves_all_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "net").write_text("old")
    with replacing(tmp_path / "net") as draft:
        assert draft.name == "net"
        draft.write_text("new")
        draft.with_name("net.data").write_text("side")
        assert (tmp_path / "net").read_text() == "old"
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"net": "new", "net.data": "side"}


def test_replacing_leaves_everything_as_it_was_after_an_exception(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "net") as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    (tmp_path / "net").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write()
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"net": "old"}
