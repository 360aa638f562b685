"""Output files: checked before the work starts, and never left half-written."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxprune.errors import InputError, WriteError


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Refuse an output path that could not be written later; the file itself is not touched.

    Raises:
        InputError: the folder is missing or read-only, or the path names a folder or a read-only file.
    """
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise InputError(f"cannot write {str(target)!r}: it is a folder; give the name of a file")
    if not folder.exists():
        raise InputError(f"cannot write {str(target)!r}: the folder {str(folder)!r} does not exist; create it first")
    if not folder.is_dir():
        raise InputError(f"cannot write {str(target)!r}: {str(folder)!r} is not a folder")
    if target.exists() and not os.access(target, os.W_OK):
        raise InputError(f"cannot write {str(target)!r}: the file exists and is read-only")
    try:
        # os.access answers for the permission bits alone; only a file made there shows that one can be made.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {str(target)!r}: the folder {str(folder)!r} takes no new file ({reason})"
        ) from None
    return target


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; what is there on success takes the place of ``path``, on an exception nothing does.

    The yielded path has the final file's name, in a temporary folder beside it, so that a format which writes side
    files (``model.onnx.data``) and names them in its main file works: all of them are moved, the main file last.

    Raises:
        InputError: ``path`` cannot be written.
        WriteError: writing failed on the way, on a full disk for instance.
    """
    target = check_writable(path)
    folder = Path(tempfile.mkdtemp(prefix=".fxprune-", dir=target.parent))
    try:
        draft = folder / target.name
        try:
            yield draft
        except OSError as error:
            raise WriteError(f"{str(target)!r} could not be written: {error.strerror or error}") from error
        for written in sorted(folder.iterdir(), key=lambda each: each == draft):
            os.replace(written, target.parent / written.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
