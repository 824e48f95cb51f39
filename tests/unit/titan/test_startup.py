"""Whose directory it is, and how long a run is."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgt_titan import checkpoint
from sgt_titan.cluster.directory import MAY_DIFFER, RUN_FILE
from sgt_titan.config.keys import keys
from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError
from sgt_titan.titan import run_directory, startup
from sgt_titan.titan.startup import check_device, once, prepare_sgt


@pytest.fixture(scope="module")
def shared(make_run):
    return prepare_sgt(make_run())


@pytest.fixture
def prepared(shared, tmp_path):
    """A prepared run with a directory of its own, claimed."""
    mine = copy.copy(shared)
    mine.config = copy.deepcopy(shared.config)
    mine.fingerprints = dict(shared.fingerprints)
    mine.config.run.output_dir = str(tmp_path / "out")
    run_directory.claim(mine)
    return mine


def refused(prepared) -> str:
    with pytest.raises(UserError) as error:
        run_directory.check(prepared)
    assert "\n" not in str(error.value)
    return str(error.value)


def commit(prepared, step):
    path = checkpoint.step_dir(prepared.config.run.output_dir, step)
    path.mkdir(parents=True)
    checkpoint.commit(path, {})
    return path


def test_new_empty_and_own_directories(prepared, tmp_path):
    assert run_directory.check(prepared) == 0
    for name in ("new", "empty"):
        prepared.config.run.output_dir = str(tmp_path / name)
        if name == "empty":
            (tmp_path / name).mkdir()
        assert run_directory.check(prepared) == 0


def test_step_of_the_newest_committed_checkpoint(prepared):
    commit(prepared, 7)
    commit(prepared, 20)
    checkpoint.step_dir(prepared.config.run.output_dir, 30).mkdir()
    assert run_directory.check(prepared) == 20


def test_foreign_directory(prepared, tmp_path):
    folder = tmp_path / "thesis"
    (folder / "logs").mkdir(parents=True)
    prepared.config.run.output_dir = str(folder)
    assert run_directory.check(prepared) == 0  # a scheduler's logs are no one's run
    (folder / "chapter1.tex").write_text("")
    assert refused(prepared) == (
        f"run.output_dir: {folder} holds 'chapter1.tex' and is not a run of ours; choose another directory"
    )
    assert (folder / "chapter1.tex").exists()


def test_checkpoints_of_nobody_known_are_not_gone_on_from(prepared):
    """Without the record of the run that wrote them nothing says what they were trained on."""
    folder = commit(prepared, 7).parents[1]
    (folder / RUN_FILE).unlink()
    assert refused(prepared).startswith(f"run.output_dir: {folder} holds 'checkpoints' and is not a run of ours")


@pytest.mark.parametrize("below", [(), ("a", "b")])
def test_output_dir_that_cannot_be_made(prepared, tmp_path, below):
    (tmp_path / "file").touch()
    prepared.config.run.output_dir = wanted = str(tmp_path.joinpath("file", *below))
    assert refused(prepared) == f"run.output_dir: {wanted} cannot be made: {tmp_path}/file is not a directory"


def test_changed_objective_is_named_with_the_flag_that_overrides(prepared):
    prepared.config.objective.mi.weight = 0.25
    assert refused(prepared) == (
        f"run.output_dir: {prepared.config.run.output_dir} belongs to a run that differs: objective.mi.weight: 0.0 -> "
        "0.25. Choose another directory, or continue it on purpose with --checkpoint.accept_changes true"
    )
    prepared.config.checkpoint.accept_changes = True
    assert run_directory.check(prepared) == 0


@pytest.mark.parametrize("name", ["trunk", "data"])
def test_changed_trunk_or_data(prepared, name):
    old = prepared.fingerprints[name]
    prepared.fingerprints[name] = "0123456789abcdef" * 4
    message = refused(prepared)
    assert f"belongs to a run that differs: {name} fingerprint {old[:12]} -> 0123456789ab. Choose" in message


def test_a_weight_whose_unit_changed(prepared):
    file = Path(prepared.config.run.output_dir) / "run.json"
    recorded = json.loads(file.read_text())
    assert recorded["units"]["objective.rate.weight"] == "nats a hidden token"
    file.write_text(json.dumps(recorded | {"units": {"objective.rate.weight": "nats a prompt"}}))
    assert "objective.rate.weight was in nats a prompt, is in nats a hidden token now. Choose" in refused(prepared)


def test_all_differences_are_named(prepared):
    prepared.config.run.seed = 9
    prepared.config.estimator.layers = 2
    prepared.fingerprints["data"] = "f" * 64
    message = refused(prepared)
    assert "data fingerprint" in message and "run.seed: 0 -> 9" in message and "estimator.layers: 1 -> 2" in message


def test_keys_of_a_mixture_are_named(prepared):
    """Not only a fingerprint; where a source lies may differ."""
    data = prepared.config.data
    data.source, data.sources = "", {"a": {"source": "/a", "weight": 1.0}, "b": {"source": "/b", "weight": 2.0}}
    run_directory.claim(prepared)
    data.sources = {"a": {"source": "/c", "weight": 1.0, "format": "auto"}, "b": {"source": "/b", "weight": 2.0}}
    assert run_directory.check(prepared) == 0
    data.sources["a"] |= {"weight": 3.0, "prompt_tokens": 4}
    said = "data.sources.a.weight: 1.0 -> 3.0; data.sources.a.prompt_tokens: 0 -> 4. Choose another directory"
    assert said in refused(prepared)
    del data.sources["b"]
    assert "belongs to a run that differs: data.sources: a, b -> a. Choose" in refused(prepared)


def test_what_may_differ(prepared):
    config = prepared.config
    config.run.name = "renamed"
    config.training.steps, config.training.local_batch_size = 99, 1
    config.parallelism.tensor_parallel_degree = 2
    config.cluster.nodes = 8
    config.checkpoint.interval, config.metrics.log_every = 1, 7
    config.compile.enable, config.activation_checkpoint.mode = True, "full"
    config.trunk.path, config.data.source = "/elsewhere", "/elsewhere/rows.jsonl"
    assert run_directory.check(prepared) == 0


def test_a_teacher_may_move_but_not_change_nor_leave(prepared):
    config = prepared.config
    config.finetune.teacher, prepared.fingerprints["teacher"] = "/here", "a" * 64
    run_directory.claim(prepared)
    config.finetune.teacher = "/elsewhere"
    assert run_directory.check(prepared) == 0
    prepared.fingerprints["teacher"] = "b" * 64
    assert "teacher fingerprint aaaaaaaaaaaa -> bbbbbbbbbbbb. Choose" in refused(prepared)
    config.finetune.teacher = ""
    assert "finetune.teacher: /here -> " in refused(prepared)


def test_what_must_not_differ():
    """Every key of the schema is on one of the two sides, and the ones that decide what is learned are not excused."""
    free = [key for key in keys() if key.startswith(MAY_DIFFER)]
    fixed = set(keys()) - set(free)
    for key in (
        "run.seed", "training.seq_len", "training.global_batch_size", "optimizer.lr", "objective.mi.weight",
        "objective.mi_group", "objective.mi_pairs", "objective.utility_positions", "estimator.layers", "data.obfuscate",
        "data.truncation", "data.packing", "data.prompt_tokens", "trunk.dtype", "lr_scheduler.warmup_steps",
    ):  # fmt: skip
        assert key in fixed, key
    for prefix in MAY_DIFFER:
        assert any(key.startswith(prefix) for key in keys()), f"{prefix} excuses nothing"
        # what has no dot at its end is a whole key, and excuses no other that begins like it
        assert prefix.endswith(".") or prefix in keys(), prefix


def test_claim_records_config_and_identity(prepared):
    from pathlib import Path

    from sgt_titan.config.load import RECORDED, load

    folder = Path(prepared.config.run.output_dir)
    assert load(str(folder / RECORDED)) == prepared.config
    recorded = json.loads((folder / RUN_FILE).read_text())
    assert recorded["fingerprints"] == prepared.fingerprints
    assert recorded["versions"]["torchtitan"] == "0.3.0"
    assert recorded["statistics"]["scale"] == prepared.statistics.scale
    assert recorded["hf_config"]["model_type"] == "llama"


def test_steps_from_epochs(make_run):
    source = prepare_sgt(make_run()).train_source
    for epochs in (1.0, 2.5, 0.01):
        prepared = prepare_sgt(make_run("--training.steps=0", f"--training.epochs={epochs}"))
        assert prepared.config.training.steps == max(1, math.ceil(epochs * source.rows / 4))
    assert prepare_sgt(make_run("--training.steps=17")).config.training.steps == 17


def test_an_objective_without_positions_is_refused(make_run, tmp_path):
    """Its terms would read 0: a perfect utility, a perfect obfuscation."""
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}]} for i in range(12)]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"asked\.jsonl: no usable rows: 12 read, dropped 12 no_response"):
        prepare_sgt(make_run(f"--data.source={asked}", "--objective.utility_positions=response"))
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"instruction": "", "output": "yes, of course"}\n')
    with pytest.raises(UserError, match=r"no sample of .*answers\.jsonl has a token to obfuscate; prompts are empty"):
        prepare_sgt(make_run(f"--data.source={answers}", "--data.min_prompt_tokens=0"))


def test_training_rows_are_not_called_held_out(make_run, rows_file, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(startup.logger, "warning", said.append)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:6]))
    prepare_sgt(make_run(f"--data.source={few}"))
    prepare_sgt(make_run("--metrics.probe_every=1"))
    assert said == []
    prepare_sgt(make_run(f"--data.source={few}", "--metrics.probe_every=1"))
    assert said == ["6 samples are too few to hold any out: what the probe calls held-out is not"]


def test_a_probe_holds_whole_pair_groups(make_run):
    for samples, rows in ((4, 4), (5, 6), (1, 2)):
        source = prepare_sgt(make_run(f"--metrics.probe_samples={samples}", "--objective.mi_group=2")).probe_source
        assert source.global_batch_size == rows


def test_a_fine_tuned_trunk_is_another_trunk(make_run, trunk_dir, tmp_path, shared):
    path = shutil.copytree(trunk_dir("llama"), tmp_path / "tuned")
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, path / "model.safetensors")
    tuned = prepare_sgt(make_run(f"--trunk.path={path}"))
    assert tuned.fingerprints["trunk"] != shared.fingerprints["trunk"]
    assert tuned.fingerprints["data"] == shared.fingerprints["data"]
    assert tuned.statistics.scale == pytest.approx(1.001 * shared.statistics.scale, rel=1e-6)


def test_changed_rows_are_other_data(make_run, rows_file, tmp_path, shared):
    other = tmp_path / "rows.jsonl"
    other.write_text(rows_file.read_text().replace("it is 49", "it is 50"))
    changed = prepare_sgt(make_run(f"--data.source={other}"))
    assert changed.fingerprints["data"] != shared.fingerprints["data"]
    assert changed.fingerprints["trunk"] == shared.fingerprints["trunk"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda p: (p / "model.safetensors").unlink(), "no model.safetensors and no model.safetensors.index.json"),
        (lambda p: (p / "model.safetensors").write_bytes(b"x" * 100), "not a safetensors file"),
    ],
    ids=["tokenizer", "weights", "damage"],
)
def test_bad_trunk_directories(make_run, trunk_dir, tmp_path, edit, message):
    path = shutil.copytree(trunk_dir("llama"), tmp_path / "trunk")
    edit(path)
    with pytest.raises(UserError, match=message) as error:
        prepare_sgt(make_run(f"--trunk.path={path}"))
    assert "\n" not in str(error.value)


def test_once_builds_once_and_others_wait_for_it(tmp_path, monkeypatch):
    file, calls = tmp_path / "cache" / "x.json", []

    def build():
        calls.append(1)
        return {"a": 1.5}

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"rank 0 did not write it within 0 s; is data\.cache_dir shared storage\?"):
        once(file, build, timeout=0.1)
    monkeypatch.setenv("RANK", "0")
    assert once(file, build) == once(file, build) == {"a": 1.5}
    monkeypatch.setenv("RANK", "1")
    assert once(file, build) == {"a": 1.5}
    assert calls == [1]
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*deeper: Not a directory"):
        once(file / "deeper" / "y.json", build)


def test_float8_products_need_a_gpu_that_has_them(monkeypatch):
    config = Config()
    config.trunk.float8 = "products"
    check_device(config)  # a CPU computes them
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    for found, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=found: found)
        if fits:
            check_device(config)
            continue
        with pytest.raises(UserError, match=r"A100-SXM4-80GB has compute capability 8\.0, and .* need 8\.9; set it to"):
            check_device(config)
    config.trunk.float8 = "weights"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    check_device(config)
