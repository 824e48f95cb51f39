"""Whether other nodes can see a directory: a checkpoint on one node's disk is lost with the node."""

from __future__ import annotations

import os
from pathlib import Path

# File systems that belong to one machine. What is not listed (nfs, lustre, gpfs, beegfs, ceph, fuse...) may be shared.
LOCAL = frozenset(("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "vfat", "xfs"))


def filesystem(path: str | Path, mounts: str | None = None) -> str:
    """Type of the file system that holds ``path``, which need not exist yet; empty where the system does not say.

    Args:
        mounts: as /proc/self/mounts, for tests.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text()
        except OSError:
            return ""
    target = Path(os.path.realpath(path))
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if target.is_relative_to(point) and len(point) >= best:  # of two mounts at one place the later one counts
            best, kind = len(point), found
    return kind


def warning(path: str | Path, nodes: int, mounts: str | None = None) -> str | None:
    """What to tell somebody whose run of several nodes writes to a local disk."""
    kind = filesystem(path, mounts)
    if nodes < 2 or kind not in LOCAL:
        return None
    return (
        f"run.output_dir: {path} is on {kind}, a disk of this node alone; other nodes cannot write their part of a "
        "checkpoint there. Use shared storage (SGT_SHARED in slurm/site.env)"
    )
