"""Local and shared file systems."""

from __future__ import annotations

import pytest

from sgt_titan.cluster.storage import filesystem, warning

MOUNTS = """overlay / overlay rw 0 0
tmpfs /scratch tmpfs rw 0 0
server:/export /shared nfs4 rw 0 0
server:/home /home\\040dirs lustre rw 0 0
/dev/sda1 /shared/local ext4 rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/run1", "overlay"),
        ("/scratch/run", "tmpfs"),
        ("/scratches/run", "overlay"),
        ("/shared/run", "nfs4"),
        ("/home dirs/run", "lustre"),
        ("/shared/local/run", "ext4"),
    ],
)
def test_file_system_of_a_path(path, kind):
    assert filesystem(path, MOUNTS) == kind


def test_only_several_nodes_on_a_local_disk_are_warned():
    assert "SGT_SHARED" in warning("/scratch/run", 2, MOUNTS) and "tmpfs" in warning("/scratch/run", 2, MOUNTS)
    assert warning("/scratch/run", 1, MOUNTS) is None
    assert warning("/shared/run", 64, MOUNTS) is None


def test_this_machine_says_something(tmp_path):
    assert filesystem(tmp_path / "not" / "there")
