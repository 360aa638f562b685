import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.errors import InputError, WriteError
from fxprune.io.files import check_writable, replacing


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


def refused(path: Any) -> str:
    """The same words before the work and when it is written."""
    said = []
    for attempt in (check_writable, lambda p: replacing(p).__enter__()):
        with pytest.raises(InputError) as caught:
            attempt(path)
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


def test_what_is_no_plain_file_is_refused_and_stays(tmp_path: Path) -> None:
    pipe, plug, link = tmp_path / "pipe", tmp_path / "plug", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    rest = "; only plain files are written, whole or not at all"
    assert refused(pipe) == f"cannot write '{pipe}': it is a pipe{rest}"
    assert refused(link) == f"cannot write '{link}': it is a link to '{pipe}', and that is a pipe{rest}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(plug))
        assert refused(plug) == f"cannot write '{plug}': it is a socket{rest}"
    for device in ("/dev/null", "/dev/full"):
        assert refused(device) == f"cannot write '{device}': it is a device{rest}"
        assert stat.S_ISCHR(os.stat(device).st_mode)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_links_are_followed(tmp_path: Path) -> None:
    for name in ("there", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "net.onnx").write_text("old")
    for link, target in (("a.onnx", "there/net.onnx"), ("b.onnx", "new/net.onnx"), ("c.onnx", "a.onnx")):
        (tmp_path / link).symlink_to(target)
    for link, folder in (("a.onnx", "there"), ("b.onnx", "new"), ("c.onnx", "there")):
        assert check_writable(tmp_path / link) == tmp_path / link
        with replacing(tmp_path / link) as draft:
            draft.write_text(link)
            draft.with_name("net.onnx.data").write_text("side")
        assert (tmp_path / link).is_symlink()
        found = {each.name: each.read_text() for each in (tmp_path / folder).iterdir()}
        assert found == {"net.onnx": link, "net.onnx.data": "side"}


def test_links_to_nowhere_in_circles_and_to_folders(tmp_path: Path) -> None:
    for link, target in (("lost", "no/net"), ("round", "round"), ("folder", ".")):
        (tmp_path / link).symlink_to(target)
    assert refused(tmp_path / "lost") == (
        f"cannot write '{tmp_path}/lost': it is a link to '{tmp_path}/no/net', and the folder '{tmp_path}/no' does not "
        "exist; create it first"
    )
    assert refused(tmp_path / "round") == f"cannot write '{tmp_path}/round': Too many levels of symbolic links"
    assert refused(tmp_path / "folder") == (
        f"cannot write '{tmp_path}/folder': it is a link to '{tmp_path}', and that is a folder; give the name of a file"
    )


def test_paths_that_are_none(tmp_path: Path) -> None:
    for wrong in (3, None, b"net", ["net"]):
        assert refused(wrong) == f"{wrong!r} is no path: pass a str or a pathlib.Path"
    assert refused(torch.nn.Linear(2, 2)).startswith("Linear(in_features=2, out_features=2, bias=True) is no path")
    assert refused(torch.nn.Sequential(*[torch.nn.ReLU()] * 9)) == "Sequential is no path: pass a str or a pathlib.Path"
    assert refused("") == "'' is no path: pass the name of a file"
    assert refused("net/") == "'net/' is the name of a folder; give the name of a file"
    assert refused("a\0b") == "cannot write 'a\\x00b': embedded null byte"
    assert refused("\ud800").startswith("cannot write '\\ud800': ")
    name = "n" * 300
    assert refused(tmp_path / name) == f"cannot write '{tmp_path}/{name}': File name too long"
    assert list(tmp_path.iterdir()) == []


def test_the_output_of_the_process_is_no_output_file(tmp_path: Path) -> None:
    script = "from fxprune.io.files import check_writable; check_writable('told')"
    with (tmp_path / "told").open("w") as told:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=told, stderr=subprocess.PIPE, cwd=tmp_path, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
    assert "cannot write 'told': it is where the output of this process goes; give another file" in done.stderr


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o666])
def test_a_file_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    target = tmp_path / "net"
    target.touch()
    target.chmod(mode)
    with replacing(target) as draft:
        draft.write_text("new")
        draft.with_name("side").touch()
    assert stat.S_IMODE(target.stat().st_mode) == mode
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "side").stat().st_mode) == 0o666 & ~umask


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    target = tmp_path / "net"
    target.touch()
    os.chown(target, 12, 34)
    with replacing(target) as draft:
        draft.write_text("new")
    assert (target.stat().st_uid, target.stat().st_gid, target.read_text()) == (12, 34, "new")


def test_a_file_that_cannot_be_replaced_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    (tmp_path / "net").write_text("old")
    monkeypatch.setattr(os, "replace", busy)
    with replacing(tmp_path / "net") as draft:
        draft.write_text("new")
    assert (tmp_path / "net").read_text() == "new"
    with (
        pytest.raises(WriteError, match=r"/other' could not be written: Device or resource busy"),
        replacing(tmp_path / "other") as draft,
    ):
        draft.touch()
    assert [each.name for each in tmp_path.iterdir()] == ["net"]
