"""What appears whole or not at all when something fails; folders that cannot be made or written, before anything is."""

import errno
import os
import signal
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from sgt_titan import disk
from sgt_titan.disk import writable
from sgt_titan.errors import UserError


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    disk.write(file, "old")
    assert file.read_text() == "old"
    for failing in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, full)
            with pytest.raises(OSError, match="No space"):
                disk.write(file, "new, and longer")
        assert file.read_text() == "old" and names(tmp_path) == ["x.json"]
    disk.write(file, "ä" * 3)
    assert file.read_bytes() == "äää".encode()


def test_many_writers_of_one_file(tmp_path):
    """Runs that start together share a cache: each writes its whole text, and the last one stands."""
    file = tmp_path / "shared.json"
    texts = [str(n) * 50_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: disk.write(file, text), texts * 4))
    assert file.read_text() in texts and names(tmp_path) == ["shared.json"]


def test_what_is_written_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []

    def synced(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", synced)
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append("renamed"), rename(source, target)))
    disk.write(tmp_path / "x", "text")
    assert [name.partition(".")[2][:1] for name in done[:1]] == ["x"] and done[1:] == ["renamed", tmp_path.name]
    del done[:]
    disk.write(tmp_path / "x", "text", sync=False)
    assert done == ["renamed"]


def test_a_file_system_that_cannot_sync_is_no_failure(tmp_path, monkeypatch):
    def refuses(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuses)
    disk.write(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"


def test_a_name_as_long_as_names_may_be(tmp_path):
    disk.write(tmp_path / ("ä" * 127), "text")
    with disk.whole(tmp_path / "folder" / ("b" * 255)) as work:
        (work / "x").touch()
    assert names(tmp_path / "folder") == ["b" * 255]


def test_lines_are_appended_whole(tmp_path, monkeypatch):
    """What a crash has cut off stays one bad line, and does not take the next one with it."""
    file = tmp_path / "attempts.jsonl"
    disk.append(file, "one")
    disk.append(file, "zwö")
    assert file.read_text() == "one\nzwö\n"
    file.write_text("one\ntw")
    disk.append(file, "three")
    assert file.read_text().splitlines() == ["one", "tw", "three"]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        disk.append(file, "four")


def test_a_new_file_is_its_owner_s_and_never_half_written(tmp_path, monkeypatch):
    file = tmp_path / "key"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            disk.create(file, "secret")
    assert names(tmp_path) == []
    disk.create(file, "secret")
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        disk.create(file, "another")
    assert file.read_text() == "secret" and names(tmp_path) == ["key"]


def test_one_of_many_makes_a_new_file(tmp_path):
    def attempt(n):
        try:
            disk.create(tmp_path / "key", str(n))
        except FileExistsError:
            return None
        return n

    with ThreadPoolExecutor(8) as pool:
        made = [n for n in pool.map(attempt, range(8)) if n is not None]
    assert [str(n) for n in made] == [(tmp_path / "key").read_text()] and names(tmp_path) == ["key"]


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), disk.whole(folder) as work:
        (work / "weights").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path / "deep") == []
    for failing in ("fsync", "rename"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"), disk.whole(folder) as work:
            (work / "weights").write_text("all")
            patch.setattr(os, failing, full)
        assert names(tmp_path / "deep") == []
    folder.mkdir()  # an empty one may be there
    with disk.whole(folder) as work:
        (work / "sub").mkdir()
        (work / "sub" / "weights").write_text("all")
        assert names(folder) == []
    assert (folder / "sub" / "weights").read_text() == "all" and names(tmp_path / "deep") == ["out"]


def test_a_folder_that_somebody_else_has_made_meanwhile_stays(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(OSError), disk.whole(folder) as work:
        (work / "mine").touch()
        folder.mkdir()
        (folder / "theirs").touch()
    assert names(folder) == ["theirs"] and names(tmp_path) == ["out"]


def test_an_earlier_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder, rename = tmp_path / "out", os.rename
    with disk.whole(folder) as work:
        (work / "old").touch()

    def once(source, target):
        if str(target) == str(folder) and (source / "new").exists():
            full()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", once)
        with pytest.raises(OSError, match="No space"), disk.whole(folder, overwrite=True) as work:
            (work / "new").touch()
    assert names(folder) == ["old"] and names(tmp_path) == ["out"]
    with disk.whole(folder, overwrite=True) as work:
        (work / "new").touch()
    assert names(folder) == ["new"] and names(tmp_path) == ["out"]


def test_a_process_that_is_killed_leaves_what_was_there(tmp_path):
    disk.write(tmp_path / "file", "old")
    with disk.whole(tmp_path / "folder") as work:
        (work / "old").touch()
    words = (
        "import os, pathlib, signal\nfrom sgt_titan import disk\nhere = pathlib.Path()\n"
        "with disk.replacing(here / 'file') as f, disk.whole(here / 'folder', overwrite=True) as d:\n"
        "    f.write_text('new'); (d / 'new').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", words], cwd=tmp_path, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path / "folder") == ["old"]
    left = set(names(tmp_path)) - {"file", "folder"}
    assert len(left) == 2 and all(name.startswith(".f") and name.endswith(".tmp") for name in left)


def test_discarded_folders_are_gone_at_once(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(disk.shutil, "rmtree", lambda *_, **__: None)  # never gets to it
    disk.discard(tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(names(tmp_path)) == 1
    disk.discard(tmp_path / "out")  # another process was faster


# -- asked before anything is written ----------------------------------------------------------------------------------


def test_targets(tmp_path, monkeypatch):
    def refused(folder, message, **options):
        with pytest.raises(UserError) as error:
            disk.check_target(folder, "OUT", **options)
        assert str(error.value) == f"OUT: {folder}{message}"

    new, empty, used, link = (tmp_path / name for name in ("new", "empty", "used", "link"))
    empty.mkdir()
    used.mkdir()
    (used / "weights").touch()
    link.symlink_to(empty)
    disk.check_target(new, "OUT")
    disk.check_target(empty, "OUT")
    exists = " exists and is not {}; choose another output directory"
    refused(link, exists.format("a directory"))
    refused(used / "weights", exists.format("a directory"))
    refused(used, exists.format("an empty directory"))
    refused(used, exists.format("an empty directory"), overwrite=True)
    kind = {"earlier": lambda folder: (folder / "weights").exists(), "part": lambda name: name == "weights"}
    already = " is not empty: an export is already there; choose another output directory or allow overwriting"
    refused(used, already, **kind)
    disk.check_target(used, "OUT", overwrite=True, **kind)
    (used / "notes.md").touch()
    lost = "/notes.md is not part of an export and would be lost; move it away first"
    refused(used, lost, overwrite=True, **kind)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused(new, f" cannot be written: no permission in {tmp_path}")
    with monkeypatch.context() as patch:  # as a container's volume
        patch.setattr(os.path, "ismount", lambda path: path == empty)
        refused(empty, " is a mount point, whose place nothing can take; name a folder in it")
    with pytest.raises(UserError, match="no permission"):  # also where it is there: it is renamed in its parent
        disk.check_target(empty, "OUT")


def test_room(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: namedtuple("usage", "free")({tmp_path: 10**9}[path]))
    assert disk.free(tmp_path / "a" / "b") == 10**9
    disk.require_room(tmp_path / "a", 10**9)
    with pytest.raises(UserError, match=f"^{tmp_path}/a: 1.000 GB free, 1.001 GB needed; free some space"):
        disk.require_room(tmp_path / "a", 10**9 + 10**6)


def test_the_nearest_part_that_exists(tmp_path, monkeypatch):
    assert writable(tmp_path / "a" / "b", "--out") == writable(tmp_path, "--out") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert writable("a/b", "--out") == tmp_path


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("file", "nowhere"):
        for path in (tmp_path / name, tmp_path / name / "a"):
            with pytest.raises(
                UserError, match=f"^--out: {path} cannot be made: {tmp_path / name} is not a directory$"
            ):
                writable(path, "--out")


def test_a_read_only_mount_is_not_a_matter_of_permission(tmp_path, monkeypatch):
    mounted = SimpleNamespace(f_flag=os.ST_RDONLY)
    monkeypatch.setattr(os, "statvfs", lambda path: mounted)
    with pytest.raises(UserError, match=f"{tmp_path}/a cannot be written: {tmp_path} is on a read-only file system$"):
        writable(tmp_path / "a", "--out")


def test_no_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=f"^--out: {tmp_path}/a cannot be written: no permission in {tmp_path}$"):
        writable(tmp_path / "a", "--out")
