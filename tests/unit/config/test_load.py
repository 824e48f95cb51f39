import dataclasses
import re
import tomllib
import typing
from pathlib import Path

import pytest
import yaml

from sgt_titan.config.keys import choices, get, inner, is_optional, keys, sections
from sgt_titan.config.load import available, difference, dump, find, load
from sgt_titan.config.overrides import parse_overrides
from sgt_titan.config.schema import Auto, Config, Source
from sgt_titan.errors import UserError


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_configs").mkdir()


def write(text: str, name: str = "x") -> str:
    Path("train_configs", f"{name}.yaml").write_text(text)
    return name


def error(text: str, overrides=()) -> str:
    with pytest.raises(UserError) as caught:
        load(write(text), list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def other_value(hint, default):
    """A value of the type that is not the default."""
    if is_optional(hint):
        return other_value(inner(hint), default)
    if choices(hint):
        return next(choice for choice in choices(hint) if choice != default)
    if hint is Source:
        return {"source": "x.jsonl", "prompt_tokens": 3}
    if typing.get_origin(hint) is dict:
        item = typing.get_args(hint)[1]
        return {"a": other_value(item, {})} if item is Source else {"text": "yes", "input": "1e-3"}
    if hint is Auto:
        return "auto"
    if hint is bool:
        return not default
    return f"{default} 'é: #1e-3" if hint is str else (default or 0) + {int: 7, float: 1e-7}[hint]


def changed_config() -> Config:
    config = Config()
    for key, leaf in keys().items():
        section, _, name = key.rpartition(".")
        setattr(get(config, section), name, other_value(leaf.hint, leaf.default))
    return config


def test_keys_cover_every_field_of_the_schema():
    def count(config):
        values = [getattr(config, field.name) for field in dataclasses.fields(config)]
        return sum(count(value) if dataclasses.is_dataclass(value) else 1 for value in values)

    assert len(keys()) == count(Config())
    assert {"objective.mi.ramp_steps", "data.columns", "run.name"} <= set(keys())
    assert {"objective", "objective.mi"} <= set(sections())


def test_an_empty_file_gives_the_defaults():
    assert load(write("")) == Config()
    assert load(write("training:\n  # steps: 3\n")) == Config()


def test_dump_round_trips_every_key():
    config = changed_config()
    config.trunk.architecture = "/a/config.json"
    assert load(write(dump(config))) == config
    assert load(write(dump(Config()))) == Config()
    assert len(difference(Config(), config)) == len(keys())


def test_values_of_every_type():
    config = load(
        write(
            "run: {name: a}\ntraining: {steps: 5, max_norm: 2}\noptimizer: {lr: 1e-3, eps: '2E-9'}\n"
            "metrics: {wandb: true}\nobjective: {preset: none, mi: {weight: 0.5, ramp_steps: 3}}\n"
            "lr_scheduler: {decay_ratio: null}\ndata: {columns: {text: story}}\n"
        )
    )
    assert config.training.steps == 5 and config.optimizer.lr == 1e-3 and config.optimizer.eps == 2e-9
    assert type(config.training.max_norm) is float and config.training.max_norm == 2.0
    assert config.metrics.wandb is True and config.objective.preset == "none"
    assert (config.objective.mi.weight, config.objective.mi.ramp_steps) == (0.5, 3)
    assert config.lr_scheduler.decay_ratio is None and config.data.columns == {"text": "story"}


X = "train_configs/x.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {step: 3}", f"{X}: unknown key training.step; did you mean training.steps?"),
        ("trainning: {steps: 3}", f"{X}: unknown section trainning; did you mean training?"),
        ("seq_len: 3", f"{X}: unknown section seq_len; did you mean training.seq_len?"),
        ("optimizer: {seed: 3}", f"{X}: unknown key optimizer.seed; did you mean run.seed?"),
        ("objective: {mi: {wieght: 3}}", f"{X}: unknown key objective.mi.wieght; did you mean objective.mi.weight?"),
        ("zzzz: 3", f"{X}: unknown section zzzz"),
        ("1: 3", f"{X}: unknown section 1"),
        ("training: 5", f"{X}: training is a section with keys below it, got 5"),
        ("objective: {mi: 0.1}", f"{X}: objective.mi is a section with keys below it, got 0.1"),
        ("training: {steps: abc}", f"{X}: training.steps must be an integer, got 'abc'"),
        ("training: {steps: 3.0}", f"{X}: training.steps must be an integer, got 3.0"),
        ("training: {steps: true}", f"{X}: training.steps must be an integer, got True"),
        ("training: {steps: '3'}", f"{X}: training.steps must be an integer, got '3'"),
        ("training: {steps: null}", f"{X}: training.steps must be an integer, got None"),
        ("optimizer: {lr: fast}", f"{X}: optimizer.lr must be a number, got 'fast'"),
        ("optimizer: {lr: false}", f"{X}: optimizer.lr must be a number, got False"),
        ("optimizer: {lr: .nan}", f"{X}: optimizer.lr must be a number, got nan"),
        ("optimizer: {lr: nan}", f"{X}: optimizer.lr must be a number, got 'nan'"),
        ("optimizer: {lr: 1e400}", f"{X}: optimizer.lr must be a number, got '1e400'"),
        ("objective: {mi: {weight: x}}", f"{X}: objective.mi.weight must be a number or none, got 'x'"),
        ("metrics: {wandb: 1}", f"{X}: metrics.wandb must be true or false, got 1"),
        ("run: {name: 70}", f"{X}: run.name must be a string, got 70"),
        ("objective: {utility: kll}", f"{X}: objective.utility must be one of ce, kl, got 'kll'; did you mean kl?"),
        ("objective: {utility: [ce]}", f"{X}: objective.utility must be one of ce, kl, got ['ce']"),
        ("data: {columns: story}", f"{X}: data.columns must be a mapping from field to column, got 'story'"),
        ("data: {columns: {text: 3}}", f"{X}: data.columns.text must be a string, got 3"),
        ("- a", f"{X}: must hold sections with keys, got ['a']"),
        ("run:\n  name: a\n  name: b", f"{X} line 3: run.name is given twice"),
        ("run: {seed: 1}\ntrunk: {}\nrun: {seed: 2}", f"{X} line 3: run is given twice"),
        ("run: {seed: 1", f"{X} line 1, column 14: invalid YAML: expected ',' or '}}', but got '<stream end>'"),
        ("run: !!python/object:os.system {}", f"{X} line 1, column 6: invalid YAML: could not determine a constructor "
         "for the tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("extends: [a]", f"{X}: extends must be a file name, got ['a']"),
        ("extends: no.yaml", f"{X}: extends no.yaml, but there is no file train_configs/no.yaml"),
        ("extends: x.yaml", f"{X}: extends x.yaml, which itself extends x.yaml; one level only"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(text, message):
    assert error(text) == message


def test_not_a_text_file():
    Path("train_configs/x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"^train_configs/x.yaml: is not a UTF-8 text file$"):
        load("x")


def test_extends():
    write(
        "training: {steps: 1, seq_len: 64}\ndata: {columns: {text: a, input: b}}\nobjective: {mi: {weight: 1}}", "base"
    )
    config = load(write("extends: base.yaml\ntraining: {steps: 2}\ndata: {columns: {text: c}}"))
    assert (config.training.steps, config.training.seq_len) == (2, 64)
    assert config.data.columns == {"text": "c", "input": "b"} and config.objective.mi.weight == 1
    write("extends: base.yaml\ntraining: {stps: 2}", "base2")
    with pytest.raises(UserError, match=r"^train_configs/base2.yaml: unknown key training.stps"):
        load("base2")
    write("training: {stps: 2}", "base")
    with pytest.raises(UserError, match=r"^train_configs/base.yaml: unknown key training.stps"):
        load("x")


def test_extends_cycle_is_an_error():
    write("extends: x.yaml", "y")
    assert error("extends: y.yaml") == f"{X}: extends y.yaml, which itself extends x.yaml; one level only"


def test_architecture_is_relative_to_the_file():
    architecture = Path.cwd() / "train_configs/archs/config.json"
    assert load(write("trunk: {architecture: archs/config.json}")).trunk.architecture == str(architecture)
    assert load(write("trunk: {architecture: /a/config.json}")).trunk.architecture == "/a/config.json"
    assert load(write("trunk: {architecture: '${A}/c.json'}")).trunk.architecture == "${A}/c.json"
    assert load("x", ["--trunk.architecture", "b.json"]).trunk.architecture == "b.json"


def test_overrides():
    text = "training: {steps: 1}\ndata: {columns: {text: a, input: b}}\nlr_scheduler: {decay_ratio: 0.5}"
    words = "--training.steps 9 --optimizer.lr=1e-4 --metrics.wandb --metrics.tensorboard false --objective.mi.weight 2"
    words += " --data.columns.text story --lr_scheduler.decay_ratio none --run.name 70 --metrics.progress=TRUE"
    words += " --objective.abs_cos.weight none --run.output_dir= --training.global-batch-size -1"
    config = load(write(text), words.split())
    assert config.training.steps == 9 and config.optimizer.lr == 1e-4 and config.objective.mi.weight == 2.0
    assert config.metrics.wandb is True and config.metrics.tensorboard is False and config.metrics.progress is True
    assert config.data.columns == {"text": "story", "input": "b"}
    assert config.lr_scheduler.decay_ratio is None and config.objective.abs_cos.weight is None
    assert config.run.name == "70" and config.run.output_dir == "" and config.training.global_batch_size == -1
    assert load("x", ["--training.steps", "1", "--training.steps", "2"]).training.steps == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--training.step 3", "unknown option --training.step; did you mean --training.steps?"),
        ("--seed 3", "unknown option --seed; did you mean --run.seed?"),
        ("--training.steps abc", "--training.steps must be an integer, got 'abc'"),
        ("--training.steps 1.5", "--training.steps must be an integer, got '1.5'"),
        ("--training.steps", "--training.steps needs a value: an integer"),
        ("--training.steps --metrics.wandb", "--training.steps needs a value: an integer"),
        ("--metrics.wandb=1", "--metrics.wandb must be true or false, got '1'"),
        ("--metrics.wandb yes", "unexpected argument 'yes'; options are given as --section.key value"),
        ("--objective.utility mse", "--objective.utility must be one of ce, kl, got 'mse'"),
        ("--objective.mi 0.1", "--objective.mi is a section; give one of its keys, such as --objective.mi.weight"),
        ("--data.columns story", "--data.columns needs a field: --data.columns.text COLUMN"),
        ("--optimizer.lr inf", "--optimizer.lr must be a number, got 'inf'"),
        ("training.steps=3", "unexpected argument 'training.steps=3'; options are given as --section.key value"),
    ],
)
def test_mistakes_in_overrides(words, message):
    assert error("", words.split()) == message


def test_names_resolve_to_files():
    write("training: {steps: 1}", "llama1b")
    write("training: {steps: 2}", "qwen32b")
    Path("own.yaml").write_text("training: {steps: 3}")
    assert {"llama1b", "qwen32b"} <= set(available())
    for name in ("llama1b", "llama1b.yaml", "train_configs/llama1b.yaml", "train_configs/llama1b"):
        assert load(name).training.steps == 1
    assert load("own.yaml").training.steps == 3
    with pytest.raises(UserError) as caught:
        find("lama1b")
    assert str(caught.value).startswith("no config or file named lama1b; did you mean llama1b?; available: ")
    assert "qwen32b" in str(caught.value)
    with pytest.raises(UserError, match=r"^no such file: else/where.yaml$"):
        find("else/where.yaml")


def test_the_working_directory_wins_over_the_checkout():
    checkout = Path(__file__).resolve().parents[3] / "train_configs"
    shipped = sorted(path.stem for path in checkout.glob("*.yaml"))
    assert set(shipped) <= set(available())
    write("training: {steps: 77}", shipped[0])
    assert load(shipped[0]).training.steps == 77


def test_the_package_ships_the_checkout_s_configs():
    """`pip install` alone has them: pyproject.toml's package data go through the link."""
    ours = Path(__file__).resolve().parents[3]
    link = ours / "sgt_titan" / "train_configs"
    assert link.is_symlink() and link.resolve() == ours / "train_configs"
    data = tomllib.loads((ours / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["sgt_titan"]
    files = {path for path in (ours / "train_configs").rglob("*") if path.is_file()}
    assert {path.resolve() for pattern in data for path in (ours / "sgt_titan").glob(pattern)} >= files


def test_difference_names_keys_and_values():
    a, b = Config(), Config()
    b.training.steps, b.objective.mi.weight, b.data.columns, b.run.name = 9, 0.5, {"text": "a"}, ""
    assert difference(a, b) == [
        "run.name: sgt -> ''",
        "objective.mi.weight: null -> 0.5",
        "data.columns: {} -> {text: a}",
        "training.steps: 0 -> 9",
    ]
    assert difference(a, Config()) == []


def test_dump_is_plain_yaml():
    assert yaml.safe_load(dump(Config())) == dataclasses.asdict(Config())


@pytest.mark.parametrize(
    "text", ["training.steps: 5\ntraining: {steps: 7}\n", "training: {steps: 7}\ntraining.steps: 5\n"]
)
def test_a_key_in_both_spellings_is_refused(text):
    assert error(text) == "train_configs/x.yaml: training.steps is given twice"


def test_bottomless_yaml_is_one_line():
    assert error("a: " + "[" * 5000) == "train_configs/x.yaml: invalid YAML: nested too deeply"


def test_a_mapping_of_anything():
    words = ["--data.template_kwargs.enable_thinking", "false", "--data.template_kwargs.effort=low"]
    assert parse_overrides(words)["data.template_kwargs"] == {"enable_thinking": False, "effort": "low"}
    with pytest.raises(UserError, match=r"--data\.template_kwargs needs a field: --data\.template_kwargs\.NAME VALUE"):
        parse_overrides(["--data.template_kwargs", "x"])


def test_sources_are_tables_checked_key_by_key():
    Path("mix.yaml").write_text(
        "data:\n  sources:\n    a: one.jsonl\n    b: {source: [x.csv, y.csv], weight: 2, columns: {text: t}}\n"
        "  validation_source: own.jsonl\n"
    )
    config = load("mix.yaml", ["--data.sources.a.weight", "1e-1", "--data.sources.b.columns.text", "u",
                               "--data.sources.a.max_samples=7", "--data.sources.c.source", "demo"])  # fmt: skip
    assert config.data.sources == {
        "a": {"source": "one.jsonl", "weight": 0.1, "max_samples": 7},
        "b": {"source": "x.csv\ny.csv", "weight": 2.0, "columns": {"text": "u"}},
        "c": {"source": "demo"},
    }
    assert config.data.validation_source == {"source": "own.jsonl"} and config.data.called == "a, b, c"
    Path("again.yaml").write_text(dump(config))
    assert load("again.yaml") == config
    for words, says in (
        (["--data.sources.a.wieght", "1"], "--data.sources.a: unknown key 'wieght'; did you mean weight?"),
        (["--data.sources.a.weight", "much"], "--data.sources.a.weight must be a number, got 'much'"),
        (["--data.sources", "x"], "--data.sources needs a field: --data.sources.NAME.source FILE"),
        (["--data.validation_source.split", "tset", "--data.validation_source.cow", "1"], "unknown key 'cow'"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            load("mix.yaml", words)
