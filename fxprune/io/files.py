"""Output files: checked before the work starts, and never left half-written."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxprune.errors import InputError, WriteError, named

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Refuse an output path that could not be written later; the file itself is not touched.

    Raises:
        InputError: the path is none, its folder is missing or takes no file of that name, or what is there is
            read-only or no plain file.
    """
    named = as_path(path)
    try:
        target = _target(named)
        _check_target(named, target)
        # Permission bits do not tell everything, nor is every name short enough: a file is made as it will be made.
        with _draft_beside(target) as draft:
            draft.touch()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(named)!r}: {_reason(error)}") from None
    return named


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; what is there on success takes the place of ``path``, on an exception nothing does.

    The yielded path has the final file's name, in a temporary folder beside it, so that a format which writes side
    files (``model.onnx.data``) and names them in its main file works: all of them are moved, the main file last. Of a
    link it is what the link leads to that is written, and a file that is there keeps its mode and its owner.

    Raises:
        InputError: ``path`` cannot be written.
        WriteError: writing failed on the way, on a full disk for instance.
    """
    named = check_writable(path)
    target = _target(named)
    with contextlib.ExitStack() as stack:
        try:
            draft = stack.enter_context(_draft_beside(target))
            yield draft
            for written in sorted(draft.parent.iterdir(), key=lambda each: each == draft):
                _put(written, target.with_name(written.name))
        except OSError as error:
            if isinstance(error, WriteError):
                raise
            raise WriteError(f"{str(named)!r} could not be written: {_reason(error)}") from error


@contextlib.contextmanager
def filling(path: str | os.PathLike[str], replaces: str = "") -> Iterator[Path]:
    """A folder to write files to; on success they are moved to the folder ``path``, on an exception nothing is.

    ``path`` is made where it is not there, in one step. Else its own files stay, but for those of the same name and
    those whose names are like ``replaces`` (a pattern of ``fnmatch``), which belong to what was there before.

    Raises:
        InputError: ``path`` cannot be a folder, or takes no file.
        WriteError: writing failed on the way, on a full disk for instance.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        raise InputError(f"{named(path)} is no path of a folder: pass a str or a pathlib.Path")
    folder = Path(os.path.realpath(text))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write to {text!r}: it is a file; give the name of a folder")
    if not folder.is_dir() and not folder.parent.is_dir():
        raise InputError(f"cannot write to {text!r}: the folder {str(folder.parent)!r} does not exist; create it first")
    place = ""
    try:
        with _draft_beside(folder / "draft" if folder.is_dir() else folder) as draft:
            place = str(draft)
            draft.mkdir()
            yield draft
            if not folder.is_dir():
                os.replace(draft, folder)
                return
            written = sorted(draft.iterdir())
            for file in written:
                os.replace(file, folder / file.name)
            for old in folder.glob(replaces) if replaces else ():
                if old.name not in {file.name for file in written}:
                    old.unlink()
    except OSError as error:
        if isinstance(error, WriteError):
            raise WriteError(str(error).replace(place, text)) from error
        raise WriteError(f"{text!r} could not be written: {_reason(error)}") from error


def as_path(path: Any) -> Path:
    """The path of a file.

    Raises:
        InputError: it is something else.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise InputError(f"{named(path)} is no path: pass a str or a pathlib.Path")
    if not text:
        raise InputError("'' is no path: pass the name of a file")
    if text.endswith(("/", os.sep)):
        raise InputError(f"{text!r} is the name of a folder; give the name of a file")
    return Path(text)


def _target(path: Path) -> Path:
    """Where a link leads, else the path itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _check_target(named: Path, target: Path) -> None:
    say, it = f"cannot write {str(named)!r}: ", "it"
    if target != named:
        say, it = f"{say}it is a link to {str(target)!r}, and ", "that"
    folder = target.parent
    found = _status(named)
    if found is None:
        if not folder.exists():
            raise InputError(f"{say}the folder {str(folder)!r} does not exist; create it first")
        if not folder.is_dir():
            raise InputError(f"{say}{str(folder)!r} is not a folder")
        return
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{say}{it} is a folder; give the name of a file")
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for of, name in _KINDS if of(found.st_mode)), "no plain file")
        raise InputError(f"{say}{it} is {kind}; only plain files are written, whole or not at all")
    if not os.access(target, os.W_OK):
        raise InputError(f"{say}the file exists and is read-only")
    if any(os.path.samestat(found, stream) for stream in _standard_streams()):
        raise InputError(f"{say}{it} is where the output of this process goes; give another file")


def _standard_streams() -> Iterator[os.stat_result]:
    for number in (1, 2):
        with contextlib.suppress(OSError):  # closed
            yield os.fstat(number)


def _status(path: Path) -> os.stat_result | None:
    """Of the file that is there, links followed; None where there is none."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def _draft_beside(target: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder on the same disk."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".fxprune-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"cannot write {str(target)!r}: the folder {str(target.parent)!r} takes no new file ({_reason(error)})"
        ) from None
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(written: Path, target: Path) -> None:
    """Move a file to where it belongs, in one step where the system allows one."""
    old = _status(target)
    if old is not None:
        new = written.stat()
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            with contextlib.suppress(OSError):  # only root may give files away
                os.chown(written, old.st_uid, old.st_gid)
        written.chmod(stat.S_IMODE(old.st_mode))
    try:
        os.replace(written, target)
    except OSError:
        if old is None:
            raise
        shutil.copyfile(written, target)  # a file mounted by itself, or somebody else's, can be filled but not replaced


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
