"""The command line: what it prints, what it exits with, what it hands on, and that it does so without torch."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sgt_titan import cli, config_registry, train
from sgt_titan.config.keys import keys
from sgt_titan.config.load import load
from sgt_titan.config.resolve import resolve
from sgt_titan.errors import UserError, guarded

ROOT = Path(__file__).resolve().parents[2]
NO_WEIGHTS = "no model.safetensors and no model.safetensors.index.json in trunk; download the weights"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, bare_trunk):
    """A working directory with a config `mine` and a trunk, outside torchrun, on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone, too
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "train_configs").mkdir()
    (tmp_path / "train_configs" / "mine.yaml").write_text(
        "# What this run is for.\n# More.\ntrunk: {path: trunk}\ndata: {source: demo}\n"
        "training: {steps: 3, seq_len: 64}\n"
    )
    bare_trunk(tmp_path / "trunk")
    return tmp_path


def fake(monkeypatch, name: str, **functions):
    """Stand in for a module that a subcommand imports when it has checked its input."""
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


@pytest.fixture
def runs(monkeypatch):
    """Configs that training was called with."""
    called = []
    fake(monkeypatch, "sgt_titan.titan.main", run=lambda config: called.append(config) or 0)
    return called


def sgt_titan(*words, env=None, code="from sgt_titan.cli import main; sys.exit(main())"):
    """The command in a process of its own, which fails if it has imported torch by its end."""
    watch = "import atexit, os, sys; atexit.register(lambda: 'torch' in sys.modules and os._exit(99)); "
    full = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run([sys.executable, "-c", watch + code, *words], capture_output=True, text=True, env=full)


NAMES = "run.name must be a name that is not empty, without / and not . or .. (run.output_dir says where else), got"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train", "the following arguments are required: NAME (see sgt-titan train --help)"),
        ("train mine --training.step 3", "unknown option --training.step; did you mean --training.steps?"),
        ("train --training.step mine", "unknown option --training.step; did you mean --training.steps?"),
        ("train mine --training.steps x", "--training.steps must be an integer, got 'x'"),
        ("train mine yours", "unrecognized arguments: yours (see sgt-titan train --help)"),
        ("train mine --nproc x", "--nproc must be a whole number, got 'x'"),
        ("train mine --nproc 0", "--nproc must be at least 1, got 0"),
        ("train mine --training.seq_len 512", "training.seq_len 512 exceeds the trunk's max_position_embeddings 256"),
        (
            "train mine --parallelism.tensor_parallel_degree 2",
            "parallelism: replicate 1 x tensor 2 = 2 does not divide the world size 1",
        ),
        (
            "train mine --nproc 2 --parallelism.data_parallel_shard_degree 3",
            "parallelism: replicate 1 x shard 3 x tensor 1 = 3, but the world size is 2",
        ),
        (
            "train mine --data.packing",
            "data.packing needs a GPU (document masks have no CPU backward); set data.packing false",
        ),
        ("train mine --trunk.path no", "trunk.path: no directory no"),
        (
            "train mine --trunk.path=",
            "trunk.path is not set: it must be the directory with the frozen model's checkpoint",
        ),
        ("--foo", "unrecognized arguments: --foo (see sgt-titan --help)"),
        ("train mine --run.name=", NAMES + " "),
        ("train mine --run.name ../x", NAMES + " ../x"),
        (
            "train mine --run.output_dir trunk/config.json/x",
            "run.output_dir: trunk/config.json/x cannot be made: {here}/trunk/config.json is not a directory",
        ),
        ("prepare mine --trunk.path no", "trunk.path: no directory no"),
        ("prepare mine --nproc 2", "unknown option --nproc"),
        ("export no out", "no checkpoint directory no"),
        ("export x", "the following arguments are required: OUT (see sgt-titan export --help)"),
        ("report x --data demo", "--trunk: is needed, since x is neither a run's directory nor an export in one"),
        ("configs x", "unrecognized arguments: x (see sgt-titan configs --help)"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(words, message, capsys, runs, here):
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", f"sgt-titan: error: {message.replace('{here}', str(here))}".strip())
    assert runs == []


def test_the_three_commands_of_a_rotated_basis(capsys):
    for name in ("convert", "serve", "generate"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["conjformer", name, "--help"])
        assert stopped.value.code == 0 and f"usage: sgt-titan conjformer {name}" in capsys.readouterr().out
    assert cli.main(["conjformer"]) == 2
    assert "convert|serve|generate (see sgt-titan conjformer --help)" in capsys.readouterr().err
    assert cli.main(["conjformer", "rotate"]) == 2
    assert "invalid choice: 'rotate'" in capsys.readouterr().err


def test_an_old_name_says_the_new_one(capsys):
    for old, new in (("conjform", "convert"), ("conjserve", "serve"), ("conjgenerate", "generate")):
        assert cli.main([old, "--help"]) == 2
        assert capsys.readouterr().err == f"sgt-titan: error: sgt-titan {old} is now sgt-titan conjformer {new}\n"


def test_a_reader_that_leaves(here):
    """``sgt-titan ... | head -1``"""
    words = [sys.executable, "-c", "import sys; from sgt_titan.cli import main; sys.exit(main())", "configs"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=here)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")


def test_another_broken_pipe_is_no_reader_that_left():
    def action():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        guarded(action)


def test_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("sgt-titan: error: argument COMMAND: invalid choice: 'trian'")


def test_missing_weights_stop_a_run_but_not_a_dry_run(here, capsys, runs):
    (here / "trunk" / "model.safetensors").unlink()
    assert cli.main(["train", "mine"]) == 2
    assert capsys.readouterr().err == f"sgt-titan: error: trunk.path: {NO_WEIGHTS}\n"
    assert cli.main(["train", "mine", "--dry-run"]) == 0 and runs == []


def change(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: change(f, model_type="gemma3_text"), "model_type 'gemma3_text', which has gains of 1 + w"),
        (lambda f: change(f, quantization_config={"quant_method": "awq"}), "quantised by 'awq'"),
        (lambda f: change(f, attention_bias=True), "attention_bias = True"),
        (lambda f: change(f, num_hidden_layers=3), "has no tensor model.layers.2."),
        (lambda f: change(f, num_hidden_layers=1), "which config.json does not describe"),
        (lambda f: change(f, vocab_size=11), "model.embed_tokens.weight is (10, 8), config.json promises (11, 8)"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "its weights are a pickle (.bin)"),
        (lambda f: (f / "model.safetensors").rename(f / "model.gguf"), "it holds GGUF files"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 9), "not a safetensors file"),
        (lambda f: change(f, rms_norm_eps="1e-5"), "rms_norm_eps '1e-5', which must be a number"),
        (lambda f: change(f, rope_scaling="linear"), "rope_scaling 'linear', which must be an object"),
        (lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": {"a": 10}}}'), "token 'a' has id 10, but"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "which are two models",
        ),
    ],
)
def test_what_train_refuses_of_a_trunk_is_known_before(edit, message, here, capsys, runs, monkeypatch):
    """``--dry-run`` and ``doctor`` say the line that ``train`` says."""
    from sgt_titan import doctor

    edit(here / "trunk")
    assert cli.main(["train", "mine"]) == 2
    said = capsys.readouterr().err.removeprefix("sgt-titan: error: ").strip()
    assert message in said and "\n" not in said
    assert cli.main(["train", "mine", "--dry-run"]) == 2
    assert capsys.readouterr().err.removeprefix("sgt-titan: error: ").strip() == said
    report = {"errors": {}}
    monkeypatch.setattr(doctor, "_device", lambda *arguments: None)
    doctor.local(report, resolve(load("mine"), world_size=None), 0)
    assert report["errors"]["trunk"] == said.removeprefix("trunk: ")[:300] and runs == []


def test_dry_run_prints_a_config_that_loads_to_the_same_run(here, capsys, runs):
    words = ["--training.steps", "9", "--metrics.wandb"]
    assert cli.main(["train", *words, "mine", "--dry-run", "--nproc=2"]) == 0
    (here / "printed.yaml").write_text(capsys.readouterr().out)
    printed = load("printed.yaml")
    assert printed == resolve(load("mine", words), world_size=2) and runs == []
    assert printed.training.steps == 9 and printed.metrics.wandb and printed.training.global_batch_size == 8


def test_dry_run_is_for_the_size_the_config_names(capsys):
    words = "train mine --dry-run --cluster.nodes 2 --cluster.gpus_per_node 8 --parallelism.tensor_parallel_degree 2"
    assert cli.main(words.split()) == 0
    assert "data_parallel_shard_degree: 8\n" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 2, 75])
def test_one_process_runs_here_and_its_exit_code_is_passed_on(monkeypatch, code):
    seen = {}

    def run(config):
        seen.update(config=config, env={name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")})
        assert os.environ["MASTER_ADDR"] == "127.0.0.1" and 1024 < int(os.environ["MASTER_PORT"]) < 65536
        return code

    fake(monkeypatch, "sgt_titan.titan.main", run=run)
    assert cli.main(["train", "mine", "--training.steps", "7"]) == code
    assert seen["env"] == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert seen["config"] == resolve(load("mine", ["--training.steps", "7"]), world_size=1)


def test_errors_of_the_run_itself(monkeypatch, capsys):
    def run(config):
        raise error

    fake(monkeypatch, "sgt_titan.titan.main", run=run)
    error = UserError("the checkpoint was written\nby another trunk")
    assert cli.main(["train", "mine"]) == 2
    assert capsys.readouterr().err == "sgt-titan: error: the checkpoint was written by another trunk\n"
    monkeypatch.delenv("RANK")
    error = KeyboardInterrupt()
    assert cli.main(["train", "mine"]) == 130
    monkeypatch.delenv("RANK")
    error = ModuleNotFoundError("No module named 'torchtitan'", name="torchtitan")
    assert cli.main(["train", "mine"]) == 2
    assert capsys.readouterr().err == (
        "sgt-titan: error: torchtitan is not installed; pip install 'sgt-titan[train]'\n"
    )
    for error in (ValueError("ours"), ModuleNotFoundError("ours", name="sgt_titan.titan.gone")):
        monkeypatch.delenv("RANK")
        with pytest.raises(type(error), match="ours"):  # a defect keeps its traceback
            cli.main(["train", "mine"])


def test_under_torchrun_the_command_is_one_rank(monkeypatch, runs, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "mine"]) == 0
    assert runs[0].training.global_batch_size == 8
    assert train.main(["mine", "--training.seq_len", "x"]) == 2
    assert cli.main(["train", "mine", "--nproc", "2"]) == 2
    assert capsys.readouterr().err == ""  # rank 0 speaks


def test_train_module_needs_torchruns_environment(capsys):
    assert train.main(["mine"]) == 2
    assert train.main([]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("sgt-titan: error: RANK and WORLD_SIZE are not set: ")
    assert second == "sgt-titan: error: usage: torchrun ... -m sgt_titan.train NAME [--section.key value ...]"


@pytest.mark.parametrize(
    ("gpus", "words", "expected"),
    [
        (0, [], 1),
        (8, [], 4),
        (2, [], 1),
        (0, ["--nproc", "2"], 2),
        (4, ["--nproc", "2"], 2),
    ],
)
def test_number_of_processes(monkeypatch, runs, gpus, words, expected):
    launched = []
    monkeypatch.setattr(train, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(cli, "_launch", lambda nproc, rest: launched.append((nproc, rest)) or 0)
    assert cli.main(["train", "mine", "--cluster.gpus_per_node", "4", *words]) == 0
    if expected == 1:
        assert launched == [] and len(runs) == 1
    else:
        assert launched == [(expected, ["mine", "--cluster.gpus_per_node", "4"])] and runs == []


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(train, "visible_gpus", lambda: 2)
    assert cli.main(["train", "mine", "--nproc", "3"]) == 2
    assert capsys.readouterr().err == "sgt-titan: error: --nproc 3: only 2 GPUs are visible\n"


@pytest.mark.parametrize(
    ("listed", "expected"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0, 3", 2), ("0,-1,2", 1), ("0,1,2,3,4,5", 4)]
)
def test_visible_gpus(monkeypatch, listed, expected):
    folders = {"/proc/driver/nvidia/gpus": [1, 2, 3, 4], "/dev": [1]}
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(folders[str(self)]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert train.visible_gpus() == expected


def test_launch_passes_on_the_exit_code_and_one_line():
    """Through torchrun, which itself exits with 1 whatever its ranks exit with."""
    code = "import sys; from sgt_titan.cli import _launch; sys.exit(_launch(2, ['no_such_config']))"
    done = sgt_titan(code=code.replace("sys.exit(", "os._exit("), env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("sgt-titan: error: no config or file named no_such_config") == 1


def test_launch_counts_signals_as_a_shell_does(here):
    (here / "sgt_killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    code = (
        "from sgt_titan import cli; from torch.distributed import run; parse = run.parse_args; "
        "run.parse_args = lambda words: parse([w if w != 'sgt_titan.train' else 'sgt_killed' for w in words]); "
        "code = cli._launch(2, []); sys.stderr.flush(); os._exit(code)"
    )
    done = sgt_titan(code=code, env={"PYTHONPATH": f"{ROOT}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 137, done.stderr
    assert "ended with exit code -9" in done.stderr


def test_help_and_mistakes_do_not_import_torch():
    shown = sgt_titan("train", "--help")
    assert shown.returncode == 0, shown.stderr
    assert all(f"  --{key} " in shown.stdout for key in keys())
    wrong = sgt_titan("train", "mine", "--optimizer.lr=x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "sgt-titan: error: --optimizer.lr must be a number, got 'x'\n"
    assert sgt_titan("train", "mine", "--dry-run").returncode == 0


def test_the_watch_on_torch_works():
    assert sgt_titan(code="import torch").returncode == 99


def test_prepare(monkeypatch, capsys):
    seen = []
    dataset = types.SimpleNamespace(train=[0] * 5, validation=[0] * 2)

    def prepare(config, tokenizer_dir, *, progress):
        seen.append((config, tokenizer_dir, progress))
        return dataset

    dataset.meta = {"said": "of the rows"}
    fake(monkeypatch, "sgt_titan.data.cache", prepare=prepare, remarks=lambda meta: [f"a remark {meta['said']}"])
    assert cli.main(["prepare", "--data.max_samples", "7", "mine"]) == 0
    ((config, tokenizer_dir, progress),) = seen
    assert config.data.max_samples == 7 and tokenizer_dir == "trunk" and progress is True
    assert (
        capsys.readouterr().out == "a remark of the rows\n5 training and 2 validation samples in outputs/.cache/data\n"
    )


def test_export_and_report(monkeypatch, here, capsys):
    seen = []
    fake(monkeypatch, "sgt_titan.export", export_checkpoint=lambda *a, **k: seen.append((a, k)))
    fake(monkeypatch, "sgt_titan.evaluation.measure.evaluate", main=lambda argv: seen.append(argv))
    assert cli.main(["export", "trunk", "out", "--overwrite", "--trunk", "moved"]) == 0
    assert cli.main(["report", "out", "--trunk", "trunk", "--data", "demo", "--samples", "64"]) == 0
    assert seen == [
        (("trunk", "out"), {"overwrite": True, "trunk_path": "moved"}),
        ["--suite", "glance", "out", "--trunk", "trunk", "--data", "demo", "--samples", "64"],
    ]
    assert capsys.readouterr().out == "exported to out\n"


def test_configs_and_version(capsys):
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["mine", "What this run is for."] in [line.split(maxsplit=1) for line in lines]
    commented = [line for line in lines if " " in line]
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in commented}) == 1, "comments are aligned"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == "sgt-titan 0.1.0\n"
    assert cli.main([]) == 0 and "COMMAND" in capsys.readouterr().out


def test_config_registry(monkeypatch):
    """As torchtitan's ConfigManager uses it: getattr, then a call without arguments; dir() for its message."""
    assert "mine" in dir(config_registry)
    assert all(callable(getattr(config_registry, name)) for name in dir(config_registry))
    assert getattr(config_registry, "no_such_config", None) is None
    function = config_registry.mine
    assert function.__name__ == "mine"
    fake(monkeypatch, "sgt_titan.titan.tasks", to_trainer_config=lambda config: ("trainer", config))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert function() == ("trainer", resolve(load("mine"), world_size=2))
    monkeypatch.setitem(sys.modules, "sgt_titan.titan.tasks", None)
    with pytest.raises(ImportError, match=r"sgt_titan\.titan\.tasks"):  # said by the call, not swallowed by the lookup
        function()


def test_config_registry_tells_a_mistake_as_the_command_does(monkeypatch, capsys):
    fake(monkeypatch, "sgt_titan.titan.tasks", to_trainer_config=lambda config: pytest.fail("must not get here"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "prepared", lambda *words: (_ for _ in ()).throw(UserError("trunk.path: is wrong")))
    with pytest.raises(SystemExit) as stopped:
        config_registry.mine()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "sgt-titan: error: trunk.path: is wrong\n"
