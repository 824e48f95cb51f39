"""What a process that trains does not import; who needs it all the same gets the real thing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.optim.optimizer import _use_grad_for_differentiable

from sgt_titan.config.load import dump
from sgt_titan.titan import lean

FORBIDDEN = ["datasets", "pandas", "aiohttp", "scipy", "sklearn", "matplotlib", "networkx", "tensorboard"]
FORBIDDEN += ["transformers.modeling_utils", "torchtitan.distributed.flex_shard"]
if not torch.cuda.is_available():
    FORBIDDEN += ["torch._dynamo", "torch._inductor.standalone_compile", "sympy"]


def test_a_training_imports_none_of_these_until_its_first_step_is_done(make_run, tmp_path):
    """One process that trains: they are looked for where it says how long its start took, then the real ones work."""
    config = make_run("--run.output_dir", str(tmp_path / "out"), "--estimator.init_from_trunk", "true")
    (tmp_path / "run.yaml").write_text(dump(config))
    code = f"""
        import os, sys
        from sgt_titan import cli

        def first_step(timeline):
            print([name for name in {FORBIDDEN} if name in sys.modules], timeline._last - timeline.began > 0)
            import datasets, scipy.optimize
            from torch.utils.tensorboard import SummaryWriter
            import torchtitan.components.metrics as taken
            print(datasets.Dataset.from_dict({{"a": [1, 2]}}).num_rows)
            print(type(taken.SummaryWriter("tb")) is SummaryWriter)
            sys.stdout.flush()
            os._exit(0)

        from sgt_titan.titan.timeline import Timeline
        Timeline.summary = first_step
        cli.main(["train", "run.yaml"])
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "1", "PYTHONPATH": str(Path(lean.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    said = [line for line in done.stdout.split("\n") if "[titan]" not in line]
    assert said == ["[] True", "2", "True", ""], done.stdout[-1000:] + done.stderr[-2000:]


def test_a_name_that_was_taken_from_a_stand_in(monkeypatch):
    monkeypatch.delitem(sys.modules, "fractions", raising=False)
    with lean.stand_ins(("fractions",)):
        from fractions import Fraction

        with pytest.raises(RuntimeError, match=r"fractions\.Fraction is left away .*, and was used"):
            Fraction(1, 2)
        with pytest.raises(TypeError, match=r"fractions\.Fraction is left away .*, and was built upon"):
            type("Half", (Fraction,), {})
        assert not isinstance(1, Fraction)
    assert Fraction(1, 2) * 2 == 1
    import fractions

    assert type(Fraction(1, 2)) is fractions.Fraction and isinstance(fractions.Fraction(1), Fraction)
    assert not isinstance(1, Fraction) and Fraction.from_float(0.5) == Fraction(1, 2)


def test_who_compiles_has_the_real_names(monkeypatch):
    real, taken = importlib.import_module(lean.SYMBOLS[0]), ModuleType("taken")
    monkeypatch.setitem(sys.modules, "taken", taken)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, real.__name__, lean.StandIn(real.__name__))
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, guard_or_false
    taken.guard, taken.error = guard_or_false, GuardOnDataDependentSymNode
    assert guard_or_false(True) is True and guard_or_false(False) is False
    try:
        raise ValueError
    except GuardOnDataDependentSymNode:
        raise AssertionError from None
    except ValueError:
        pass
    lean.compiling()
    assert taken.guard is real.guard_or_false and taken.error is real.GuardOnDataDependentSymNode


def test_what_has_no_numbers_is_not_filled():
    with torch.device("meta"), lean.Unfilled():
        assert torch.nn.Linear(2, 3).weight.is_meta
    torch.manual_seed(0)
    with lean.Unfilled():
        weight = torch.nn.Linear(2, 3).weight
    torch.manual_seed(0)
    assert torch.equal(weight, torch.nn.Linear(2, 3).weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU torch's optimizers stay as they are")
def test_an_optimizer_that_is_left_alone_does_what_it_did():
    def trained(step):
        weight = torch.nn.Parameter(torch.arange(3.0))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            weight.square().sum().backward()
            step(optimizer)
        assert weight.is_leaf and weight.grad is not None
        return weight.detach()

    # What torch wraps it in, which sets and resets the mode of gradients around the step.
    wrapped = _use_grad_for_differentiable(torch.optim.Adam.step.__wrapped__)
    assert torch.equal(trained(torch.optim.AdamW.step), trained(wrapped))


def test_the_names_of_transformers_models_are_looked_for_once():
    code = (
        "import sgt_titan.titan, sys\n"
        "import transformers.models\n"
        "from transformers.utils import import_utils\n"
        "print(hasattr(import_utils.create_import_structure_from_path, '__wrapped__'), [f for f in sys.meta_path if "
        "type(f).__name__ == '_Remembering'])\n"
        "from transformers import LlamaForCausalLM\n"
        "from transformers.models.qwen3 import Qwen3Config\n"
        "print(LlamaForCausalLM.__name__, Qwen3Config.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["True []", "LlamaForCausalLM Qwen3Config"], done.stderr


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
