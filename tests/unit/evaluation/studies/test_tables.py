import json
from types import SimpleNamespace

import pytest

from sgt_titan.config.load import dump, load
from sgt_titan.config.schema import PRESETS, TERMS
from sgt_titan.errors import UserError
from sgt_titan.evaluation.studies import tables


@pytest.mark.parametrize("row", tables.ROWS)
def test_a_row_is_its_terms_and_no_other(row):
    """Also where the config gives a ramp and a denoiser of its own, as the demo does."""
    from sgt_titan.config.resolve import resolve

    config = resolve(load("demo", tables.objective(row)), world_size=None)
    weights = {term: getattr(config.objective, term).weight for term in TERMS}
    assert {term for term, weight in weights.items() if weight} == set(PRESETS[row])
    started = {term for term in TERMS if getattr(config.objective, term).start}
    assert started <= set(PRESETS[row])
    assert (config.denoiser.layers == 0) == (row in tables.PAPER_ROWS)


def test_dry_run_prints_every_command_and_runs_none(tmp_path, capsys):
    ran = []
    words = ["demo", "--out", str(tmp_path / "out"), "--pii", "rows.jsonl", "--dry-run", "--training.steps", "5"]
    assert tables.main(words, execute=lambda words: ran.append(words) or 0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not ran and not (tmp_path / "out").exists()
    assert sum(line.startswith("sgt-titan train demo") for line in lines) == 6
    assert sum(line.startswith("sgt-titan evaluate") for line in lines) == 6 + 4
    assert sum("--no-baselines" not in line for line in lines if "evaluate" in line) == 2
    assert all("--training.steps 5" in line for line in lines if " train " in line)


def finish(step):
    """As the command itself leaves it: a training its config, an evaluation its command."""
    step.done.parent.mkdir(parents=True, exist_ok=True)
    step.done.write_text(json.dumps({"about": {"command": tables.command(step.words)}}))
    if step.asked is not None:
        (step.done.parent.parent / "config.yaml").write_text(dump(step.asked))


def test_what_another_command_made_is_not_taken_for_this_one_s(tmp_path):
    """Tables carry the command they came from: another training is refused, another evaluation is asked to go on."""
    ran, out = [], tmp_path / "out"
    words = ["demo", "--out", str(out), "--rows", "mi"]
    options = {
        "config": "demo", "out": out, "rows": ["mi"], "suite": "quick", "seed": 0, "prompts": None,
        "benchmarks": "", "benchmark_dir": None, "pii": None, "pii_seq_len": None, "zero_steps": 600,
    }  # fmt: skip
    for step in tables.steps(SimpleNamespace(**options), ["--training.steps", "7"]):
        finish(step)

    def execute(words):
        ran.append(words[0])
        return 9

    with pytest.raises(UserError, match=r"mi: was trained with --training\.steps 7, not 8"):
        tables.main([*words, "--training.steps", "8"], execute=execute)
    same = [*words, "--training.steps", "7", "--checkpoint.interval", "3"]
    assert not ran and tables.main([*same, "--benchmarks", "piqa"], execute=execute) == 9 and ran == ["evaluate"]


def test_goes_on_where_it_stopped(tmp_path):
    """The second call runs what the first did not finish, and a failure is passed on."""
    ran = []

    def execute(words):
        ran.append(words[0])
        if len(ran) == 3:
            return 7
        step = next(s for s in steps if s.words == tuple(words))
        finish(step)
        return 0

    words = ["demo", "--out", str(tmp_path / "out"), "--rows", "mi,abs_cos"]
    steps = tables.steps(
        SimpleNamespace(
            config="demo", out=tmp_path / "out", rows=["mi", "abs_cos"], suite="quick", seed=0, prompts=None,
            benchmarks="", benchmark_dir=None, pii=None, pii_seq_len=None, zero_steps=600,
        ),
        [],
    )  # fmt: skip
    assert tables.main(words, execute=execute) == 7
    assert ran == ["train", "evaluate", "train"]
    assert [step.done.is_file() for step in steps] == [True, True, False, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--rows", "mi,nonsense"], "nonsense"),
        (["nothing_of_the_kind"], "nothing_of_the_kind"),
        (["demo", "--objective.abs_cos.weight", "2"], "the rows decide it"),
        (["demo", "--trainin.steps", "2"], "trainin"),
        (["demo", "--rows", ","], "^--rows: names no row; there are comp_entr, "),
        (["demo", "--prompts", "0"], "^--prompts must be at least 2, got 0$"),
        (["demo", "--run.output_dir", "x"], "^--run.output_dir: every row has its own"),
        (["demo", "--benchmarks", "arc_hard"], "^--benchmarks: 'arc_hard' is unknown"),
        (["demo", "--pii", "/nowhere.jsonl"], "^data.source: /nowhere.jsonl does not exist$"),
    ],
)
def test_bad_input(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        tables.main([*words, "--out", str(tmp_path / "out")], execute=lambda words: pytest.fail("it began"))
    assert not (tmp_path / "out").exists()
