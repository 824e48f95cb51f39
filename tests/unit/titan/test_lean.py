"""What a process that trains does not import; who needs it all the same gets the real thing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sgt_titan.titan import lean

FORBIDDEN = ("datasets", "pandas", "aiohttp", "scipy", "sklearn", "matplotlib")
if not torch.cuda.is_available():
    FORBIDDEN += ("torch._inductor.compile_fx", "torch._inductor.lowering")


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU torchtitan's attention is compiled when imported")
def test_what_is_compiled_when_it_is_called(monkeypatch):
    made = []

    def compile_now(model, **options):
        made.append((model, options))
        return model

    monkeypatch.setattr(torch, "compile", compile_now)
    with lean.when_called():
        one, other = torch.compile(max, dynamic=False), torch.compile(fullgraph=True)(min)
    assert torch.compile is compile_now and made == []
    assert (one(1, 2), one(3, 2), other(1, 2)) == (2, 3, 1)
    assert made == [(max, {"dynamic": False}), (min, {"fullgraph": True})]


def test_what_is_there_already_stays():
    with lean.stand_ins(("json",)):
        import json

        assert json.dumps([]) == "[]"
