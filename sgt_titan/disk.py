"""The one door to the disk: files and folders that appear whole or not at all, targets asked before any work, room.

What is written is made under another name beside its place, ``.NAME.*.tmp``, and renamed when it is complete and on
disk; so a reader sees what was there before or all of the new, and a process that is killed leaves such a name behind
and nothing else. No torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sgt_titan.errors import UserError

# -- files -------------------------------------------------------------------------------------------------------------


def write(file: Path, text: str, *, sync: bool = True) -> None:
    """The whole text in place of what ``file`` held; see ``replacing``."""
    with replacing(file, sync=sync) as work:
        work.write_text(text, encoding="utf-8")


@contextmanager
def replacing(file: Path, *, sync: bool = True) -> Iterator[Path]:
    """A file to write instead of ``file``, whose place it takes when the block ends well; several may do so at once.

    Args:
        sync: wait until it is on disk; False for what nothing is decided from.

    Raises:
        OSError: it cannot be written; ``file`` is as it was.
    """
    work = _beside(file)
    try:
        yield work
        if sync:
            _sync(work)
        os.replace(work, file)
    finally:
        work.unlink(missing_ok=True)
    if sync:
        _sync(file.parent)


def append(file: Path, line: str) -> None:
    """A line at the end of a file, on disk when this returns; a line of its own also after one that a crash cut off."""
    with file.open("ab+") as stream:
        cut_off = stream.tell() and os.pread(stream.fileno(), 1, stream.tell() - 1) != b"\n"
        stream.write((b"\n" if cut_off else b"") + line.encode() + b"\n")
    _sync(file)


def create(file: Path, text: str) -> None:
    """A new file that only its owner can read, whole for whoever finds it.

    Raises:
        FileExistsError: there is one, which stays as it is.
        OSError: it cannot be written.
    """
    work = _beside(file)
    try:
        with open(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
        _sync(work)
        os.link(work, file)  # unlike a rename it fails where there is one
    finally:
        work.unlink(missing_ok=True)
    _sync(file.parent)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time; where the file system knows no locks, two do the same and the last one's stays."""
    with open(lock, "w", encoding="ascii") as stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# -- folders -----------------------------------------------------------------------------------------------------------


@contextmanager
def whole(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write in, which takes the name ``folder`` when the block ends well, and is gone when it does not.

    Args:
        overwrite: what is there goes, and comes back if the new one cannot take its name. Otherwise it must be empty.

    Raises:
        OSError: it cannot be written, or there is something by now.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = _beside(folder)
    try:
        work.mkdir()
        yield work
        for path in (*work.rglob("*"), work):
            _sync(path)
        if overwrite and folder.exists():
            _exchange(work, folder)
        else:
            os.rename(work, folder)  # also over an empty one, and over no other
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _sync(folder.parent)


def _exchange(work: Path, folder: Path) -> None:
    aside = _beside(folder, "old")  # not rubbish, should it come to stay
    os.rename(folder, aside)
    try:
        os.rename(work, folder)
    except OSError:
        os.rename(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def discard(folder: Path) -> None:
    """Take a folder out of the way at once, then delete it: nobody may see it half deleted."""
    aside = _beside(folder)
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _beside(path: Path, kind: str = "tmp") -> Path:
    return path.absolute().with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.{kind}")  # names have at most 255 bytes


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


# -- asked before anything is written ----------------------------------------------------------------------------------


def check_target(
    folder: Path,
    said: str,
    *,
    overwrite: bool = False,
    earlier: Callable[[Path], bool] = lambda _: False,
    part: Callable[[str], bool] = lambda _: False,
) -> None:
    """Whether ``whole`` may write ``folder``: missing, empty, or with ``overwrite`` an export of before and no more.

    Args:
        said: what the user calls it, to begin the message with: ``OUT``, ``--client``.
        earlier: whether a folder is such an export.
        part: whether an entry of that name belongs to one: a note or a report in it would be deleted with it.

    Raises:
        UserError: it is something else, or cannot be written.
    """
    if not os.path.lexists(folder):
        writable(folder, said)
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{said}: {folder} exists and is not a directory; choose another output directory")
    if os.path.ismount(folder):
        raise UserError(f"{said}: {folder} is a mount point, whose place nothing can take; name a folder in it")
    names = sorted(entry.name for entry in folder.iterdir())
    if names and not earlier(folder):
        raise UserError(f"{said}: {folder} exists and is not an empty directory; choose another output directory")
    if names and not overwrite:
        raise UserError(
            f"{said}: {folder} is not empty: an export is already there; choose another output directory or allow "
            "overwriting"
        )
    if foreign := [name for name in names if not part(name)]:
        raise UserError(f"{said}: {folder / foreign[0]} is not part of an export and would be lost; move it away first")
    writable(folder.absolute().parent, said)


def writable(path: str | Path, said: str) -> Path:
    """The nearest part of ``path`` that exists, in which all that is missing of it can be made.

    Args:
        said: what the user calls it, to begin the message with: ``run.output_dir``, ``--out``.

    Raises:
        UserError: a file is in the way, or the folder cannot be written.
    """
    found = _existing(path)
    if not found.is_dir():
        raise UserError(f"{said}: {path} cannot be made: {found} is not a directory")
    if os.statvfs(found).f_flag & os.ST_RDONLY:
        raise UserError(f"{said}: {path} cannot be written: {found} is on a read-only file system")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"{said}: {path} cannot be written: no permission in {found}")
    return found


def free(path: str | Path) -> int:
    """Bytes that are free where ``path`` is or would be made."""
    return shutil.disk_usage(_existing(path)).free


def require_room(path: str | Path, needed: int) -> None:
    """Raises UserError where there is no room for ``needed`` bytes."""
    if (there := free(path)) < needed:
        raise UserError(
            f"{path}: {there / 1e9:.3f} GB free, {needed / 1e9:.3f} GB needed; free some space or choose another disk"
        )


def _existing(path: str | Path) -> Path:
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if os.path.lexists(folder))
