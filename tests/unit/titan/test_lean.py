"""What a process that trains does not import; who needs it all the same gets the real thing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sgt_titan.titan import lean

FORBIDDEN = ("datasets", "pandas", "aiohttp", "scipy", "sklearn", "matplotlib")


def test_a_training_process_imports_none_of_these():
    code = (
        "import sys, sgt_titan.train, sgt_titan.titan.main, sgt_titan.titan.tasks, torchtitan.trainer\n"
        f"print([name for name in {FORBIDDEN} if name in sys.modules])\n"
        "import datasets\n"
        "print(datasets.Dataset.from_dict({'a': [1, 2]}).num_rows)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["[]", "2"], done.stderr[-2000:]


def test_a_stand_in_refuses_to_be_used(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with lean.stand_ins(("colorsys",)):
        from colorsys import rgb_to_hls
    with pytest.raises(RuntimeError, match=r"colorsys\.rgb_to_hls: left away"):
        rgb_to_hls(0, 0, 0)
    from colorsys import rgb_to_hls

    assert rgb_to_hls(0, 0, 0) == (0, 0, 0)


def test_what_is_there_already_stays():
    with lean.stand_ins(("json",)):
        import json

        assert json.dumps([]) == "[]"
