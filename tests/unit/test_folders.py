"""Folders that cannot be made or written, before anything is."""

import os
from types import SimpleNamespace

import pytest

from sgt_titan.errors import UserError
from sgt_titan.folders import writable


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
