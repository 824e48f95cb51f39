"""When a run is compiled by itself, and where its code is kept. torch's tracer without a code generator: seconds."""

from __future__ import annotations

import logging
import os
import sys

import pytest
import torch
from torch import nn

from sgt_titan.titan import compilation
from sgt_titan.titan.compilation import CACHE, Price, Verdict, Watch, keep_code, missing_compiler, verdict
from sgt_titan.titan.tasks import to_trainer_config


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_verdict_follows_from_what_is_left(device):
    price = compilation.PRICES[device]
    enough = compilation.MARGIN * price.seconds / price.saves
    assert not verdict(2.0, int(enough / 2) - 1, device).compile
    assert verdict(2.0, int(enough / 2) + 1, device).compile
    assert not verdict(0.1, 500, device).compile  # the demo
    assert verdict(30.0, 3000, device).compile  # a cluster's run
    assert "500 steps of 0.1 s are left" in verdict(0.1, 500, device).words


def test_the_first_step_does_not_count(one_process, monkeypatch):
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "")
    torch.distributed.init_process_group("gloo")
    try:
        watch = Watch(torch.device("cpu"))
        found = [watch.add(seconds, 10**7) for seconds in (1000.0, 3.0, 2.0, 2.0, 9.0, 1.0)]
        assert found[:-1] == [None] * 5
        assert found[-1] is not None and found[-1].compile and "steps of 2 s" in found[-1].words
        monkeypatch.setattr(compilation, "missing_compiler", lambda device: "no C++ compiler")
        watch = Watch(torch.device("cpu"))
        *_, last = (watch.add(100.0, 10**7) for _ in range(6))
        assert last == Verdict(False, "not compiled: no C++ compiler")
    finally:
        torch.distributed.destroy_process_group()


def test_a_machine_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert missing_compiler("cpu") == "no C++ compiler"
    own = tmp_path / "my-compiler"
    own.touch(mode=0o700)
    monkeypatch.setenv("CXX", str(own))
    assert missing_compiler("cpu") == ""
    monkeypatch.setitem(sys.modules, "triton", None)
    assert missing_compiler("cuda") == "no Triton"


def trained(make_run, *options):
    """The weights and the log's own words of a run of 5 steps."""
    config = to_trainer_config(make_run("--training.steps=5", "--estimator.std_init=0.5", *options))
    config.compile.backend = "aot_eager"
    trainer = config.build()
    try:
        trainer.train()
        blocks = [dual.block for dual in trainer.model_parts[0].trunk.layers.values()]
        return (
            [p.detach().clone() for p in trainer.model_parts[0].estimator.parameters()],
            [block._compiled_call_impl is not None for block in blocks],
        )
    finally:
        trainer.close()
        torch._dynamo.reset()


def test_a_long_run_is_compiled_on_its_way(make_run, one_process, monkeypatch, caplog):
    """After two steps: the same weights at its end, and a line that says so. A deterministic one never is."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compilation, "WATCHED", 1)
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "")
    monkeypatch.setitem(compilation.PRICES, "cpu", Price(0.0, 0.5))
    with torch._dynamo.config.patch(suppress_errors=False):  # and put back what the run sets
        weights, compiled = trained(make_run, "--compile.enable=auto")
    assert all(compiled)
    (said,) = [r.message for r in caplog.records if r.message.startswith("compile.enable auto")]
    assert "compiled from the next step on: 3 steps" in said
    caplog.clear()
    plain, compiled = trained(make_run, "--compile.enable=auto", "--run.deterministic=true")
    assert not any(compiled)
    assert any("run.deterministic" in r.message for r in caplog.records)
    for one, other in zip(weights, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@torch._dynamo.config.patch(suppress_errors=True)
def test_what_cannot_be_compiled_stays_as_it_is():
    """``auto`` was not asked for by name: a backend that fails ends no run."""

    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    block = nn.Linear(3, 3)
    expected = block(torch.ones(1, 3))
    compilation.compile_blocks([block], broken, fullgraph=False)
    assert torch.equal(block(torch.ones(1, 3)), expected)
    torch._dynamo.reset()


def test_code_is_kept_where_only_its_owner_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE, "/elsewhere")
    keep_code()
    assert os.environ[CACHE] == "/elsewhere"  # the user's word
    monkeypatch.delenv(CACHE)
    keep_code()
    folder = tmp_path / "sgt_titan" / f"compiled-{torch.__version__}"
    assert os.environ[CACHE] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv(CACHE)
    folder.chmod(0o770)  # whoever can write there can run code here
    keep_code()
    assert CACHE not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    keep_code()
    assert CACHE not in os.environ
