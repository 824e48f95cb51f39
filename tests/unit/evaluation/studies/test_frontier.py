"""The grid from its words to its picture; trainings and evaluations are stood in for by what they leave behind."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from sgt_titan.config.load import dump, load
from sgt_titan.config.resolve import resolve
from sgt_titan.config.schema import TERMS
from sgt_titan.errors import UserError
from sgt_titan.evaluation.report import plane
from sgt_titan.evaluation.studies import frontier
from sgt_titan.evaluation.studies.grid import command


def estimate(value: float) -> dict:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 100}


def evaluation(kept: float, read: float, guessed: float = 0.16, *, baselines: bool = False) -> dict:
    """results.json of one evaluation, as far as the picture needs it."""

    def attacks(top1: float) -> dict:
        scores = {"top1": estimate(top1), "content_top1": estimate(top1 / 2), "marked_top1": estimate(top1 / 3)}
        less = {key: estimate(score["value"] - guessed / 4) for key, score in scores.items()}
        guess = {"top1": estimate(guessed)}
        return {
            "sequence": {"title": "sequence attacker", "kind": "single", "guesses": guess, "difference": less,
                         "notes": ["not converged: its loss still falls"], **scores},
            "averaging": {"title": "averaging", "kind": "repeats", **scores, "top1": estimate(0.9)},
            "guess": {"title": "guessing", "kind": "guess", "top1": estimate(guessed)},
        }  # fmt: skip

    def mechanism(title: str, kept: float, top1: float) -> dict:
        utility = {"kept": estimate(kept), "kl": estimate(0.1)}
        best = {"best": "sequence", "best_repeats": "averaging"}
        return {"title": title, "facts": {"std": 1.0}, "utility": utility, "attacks": attacks(top1), **best}

    found = {"sgt": {**mechanism("this SGT", kept, read), "certificate": {"nats_per_token": estimate(3.1)}}}
    if baselines:
        found |= {
            "none": mechanism("no obfuscation", 1.0, 1.0),
            "noise": mechanism("constant noise, this SGT's mean std", -3.0, 0.5),
            "noise-4": mechanism("constant noise, std 4", -0.5, 0.02),
            "redaction": mechanism("redaction", 0.6, 0.9),
        }
    return {
        "about": {"hidden_tokens": 640, "rows": 32},
        "no_prompt": {"stake": estimate(35.0), "zero": {"note": "the zero is fitted for 600 steps, settled"}},
        "mechanisms": found,
    }


class Machine:
    """Commands that leave behind what they would: an export and its config, or results."""

    def __init__(self, failing: str = "", stop_after: int = 10**6):
        self.ran: list[tuple[str, ...]] = []
        self.failing, self.stop_after = failing, stop_after

    def __call__(self, words, log: Path, jobs: int):
        if len(self.ran) == self.stop_after:
            raise KeyboardInterrupt
        self.ran.append(tuple(words))
        options = dict(pairwise(words))
        code = 3 if self.failing and any(self.failing in word for word in words) else 0
        if not code and words[0] == "train":
            run = Path(options["--run.output_dir"])
            (run / "export").mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(dump(resolve(load(words[1], list(words[2:])), world_size=None)))
            (run / "export" / "config.json").write_text("{}")
        if not code and words[0] == "evaluate":
            out = Path(options["--out"])
            out.mkdir(parents=True, exist_ok=True)
            results = evaluation(0.9, 0.4 + 0.1 * int(options["--seed"]), baselines="--no-baselines" not in words)
            results["about"]["command"] = command(words)
            (out / "results.json").write_text(json.dumps(results))
        return type("Process", (), {"wait": lambda self: code, "terminate": lambda self: None})()


def run(out: Path, *words: str, machine: Machine) -> int:
    return frontier.main(["demo", "--out", str(out), "--jobs", "1", *words], start=machine)


GRID = ("--rows", "rate=0.05,preset:mi_abs_cos", "--seeds", "0,1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, machine = tmp_path_factory.mktemp("frontier"), Machine()
    assert run(out, *GRID, machine=machine) == 0
    return out, machine


def test_a_grid_is_trained_and_attacked_seed_by_seed(finished):
    _, machine = finished
    assert [words[0] for words in machine.ran] == ["train", "evaluate"] * 4
    trained = [dict(pairwise(w)) for w in machine.ran if w[0] == "train"]
    assert [one["--run.seed"] for one in trained] == ["0", "0", "1", "1"]
    assert len({one["--run.output_dir"] for one in trained}) == 4
    assert len({one["--data.cache_dir"] for one in trained}) == 1  # one cache, and one zero of kept, for all
    assert sum("--no-baselines" not in words for words in machine.ran if words[0] == "evaluate") == 1
    weights = [load(w[1], list(w[2:])).objective for w in machine.ran if w[0] == "train"]
    assert weights[0].rate.weight == 0.05 and weights[1].preset == "mi_abs_cos" and weights[1].rate.weight == 0


def test_what_came_out(finished):
    out, _ = finished
    found = json.loads((out / "results.json").read_text())
    assert [(run["row"], run["seed"]) for run in found["runs"]] == [
        ("rate=0.05", 0), ("preset:mi_abs_cos", 0), ("rate=0.05", 1), ("preset:mi_abs_cos", 1)
    ]  # fmt: skip
    one = found["runs"][0]
    assert one["kept"]["value"] == 0.9 and one["best"]["title"] == "sequence attacker"
    assert one["best"]["difference"]["content_top1"]["value"] == pytest.approx(0.16)
    assert one["best_repeats"]["top1"]["value"] == 0.9 and one["guess"]["top1"]["value"] == 0.16
    assert set(found["baselines"]) == {"none", "noise", "noise-4", "redaction"}
    assert plane.stake_per_token(found) == pytest.approx(35 * 32 / 640)
    text = (out / "frontier.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| rate=0.05"))
    assert "45.0% [40.0, 50.0]" in line and "| 2 |" in line and "sequence attacker" in line
    assert "settled" in text and "not converged" in text and "k \u0394" in text
    page, svg = ((out / f"frontier.{kind}").read_text() for kind in ("html", "svg"))
    assert "guessed without looking" in svg and "nats a hidden token" in svg and "rate=0.05" in page


def test_again_it_runs_nothing_and_more_seeds_are_added(finished):
    out, machine = finished
    before = len(machine.ran)
    assert run(out, *GRID, machine=machine) == 0 and len(machine.ran) == before
    assert run(out, *GRID[:3], "0,1,2", machine=machine) == 0
    assert [words[0] for words in machine.ran[before:]] == ["train", "evaluate"] * 2
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 6


def test_another_config_in_the_same_place_is_refused(finished):
    out, machine = finished
    with pytest.raises(UserError, match=r"was trained with --training\.steps \d+, not 301"):
        run(out, *GRID, "--training.steps", "301", machine=machine)


def test_a_failure_is_passed_on_and_the_rest_is_drawn(tmp_path):
    machine = Machine(failing="abs_cos-0")
    assert run(tmp_path / "out", "--rows", "rate=0.05,preset:abs_cos", machine=machine) == 3
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["row"] for run in found["runs"]] == ["rate=0.05"]


def test_interrupted_it_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", *GRID, machine=Machine(stop_after=3))
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 1
    machine = Machine()
    assert run(tmp_path / "out", *GRID, machine=machine) == 0
    assert [words[0] for words in machine.ran] == ["evaluate", "train", "evaluate", "train", "evaluate"]


def test_runs_trained_before_are_only_attacked(tmp_path):
    for name in ("long", "other/export"):
        (tmp_path / name / ("export" if name == "long" else "")).mkdir(parents=True, exist_ok=True)
    for folder in (tmp_path / "long" / "export", tmp_path / "other" / "export"):
        (folder / "config.json").write_text("{}")
    machine = Machine()
    runs = ["--run", str(tmp_path / "long"), "--run", f"mine={tmp_path / 'other' / 'export'}"]
    assert run(tmp_path / "out", *runs, machine=machine) == 0
    assert [words[:2] for words in machine.ran] == [
        ("evaluate", str(tmp_path / "long" / "export")), ("evaluate", str(tmp_path / "other" / "export"))
    ]  # fmt: skip
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["row"] for run in found["runs"]] == ["long", "mine"]


def test_evaluations_made_before_are_drawn(tmp_path):
    """Several of one name are its seeds; nothing is run."""
    for i, name in enumerate(("ev-0", "ev-1")):
        (tmp_path / name).mkdir()
        results = evaluation(0.8 + 0.1 * i, 0.3) | {"format": frontier.EVALUATION_FORMAT}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    words = [word for i in range(2) for word in ("--measured", f"long={tmp_path / f'ev-{i}'}")]
    machine = Machine()
    assert run(tmp_path / "out", *words, machine=machine) == 0 and not machine.ran
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(run["row"], run["seed"]) for run in found["runs"]] == [("long", 0), ("long", 1)]
    assert "85.0% [80.0, 90.0]" in (tmp_path / "out" / "frontier.md").read_text()
    (tmp_path / "ev-1").rename(tmp_path / "rate=1")
    assert frontier.measured_before([str(tmp_path / "rate=1")])[0][0] == "rate=1"
    (tmp_path / "ev-0" / "results.json").write_text(json.dumps(evaluation(0.8, 0.3) | {"format": 1}))
    with pytest.raises(UserError, match="of an earlier version, whose `kept` counts from another zero"):
        frontier.measured_before([str(tmp_path / "ev-0")])


def test_a_rotated_basis_stands_in_the_plane(tmp_path):
    """What `evaluate --rotated` measured beside the SGT is drawn and listed, whatever it is named."""
    results = evaluation(0.9, 0.7)
    turned = {**results["mechanisms"]["sgt"], "title": "this SGT, then a secret rotation"}
    results["mechanisms"]["sgt_rotated"] = turned
    (tmp_path / "results.json").write_text(json.dumps(results | {"format": frontier.EVALUATION_FORMAT}))
    out = tmp_path / "out"
    words = ["demo", "--measured", f"rate 0.05={tmp_path}", "--draw", "--out", str(out)]
    assert frontier.main(words) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["baselines"]["sgt_rotated"]["kept"]["value"] == found["runs"][0]["kept"]["value"] == 0.9
    assert "then a secret rotation" in (out / "frontier.md").read_text()
    assert "then a secret rotation" in (out / "frontier.svg").read_text()


def test_rows_and_grids():
    config = resolve(load("demo"), world_size=None)
    found = frontier.rows(["rate=0.1+denoiser.layers=2", "preset:mi"], ["estimator.layers=1,2"], config)
    assert [row.name for row in found] == [
        f"{row}+estimator.layers={n}" for row in ("rate=0.1+denoiser.layers=2", "preset:mi") for n in (1, 2)
    ]
    objective = load("demo", list(found[0].words)).objective
    resolved = resolve(load("demo", list(found[0].words)), world_size=None)
    assert objective.rate.weight == 0.1 and resolved.denoiser.layers == 2 and resolved.estimator.layers == 1
    assert {term for term in TERMS if getattr(resolved.objective, term).weight} == {"rate"}
    # Where the config prices information already, its preset stays.
    priced = resolve(load("demo", ["--objective.preset", "rate_abs_cos"]), world_size=None)
    assert frontier.rows(["rate=0.2"], [], priced)[0].words == ("--objective.rate.weight", "0.2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "rate=much"], "'rate=much' is no weight"),
        (["--rows", "preset:magic"], "no preset 'magic'; there are comp_entr"),
        (["--rows", "hope"], "'hope' is neither rate=WEIGHT"),
        (["--rows", "rate=1,rate=1"], "'rate=1' is there twice"),
        (["--rows", "denoiser.layer=2"], "denoiser.layer"),
        (["--rows", "estimator.layers=99"], "estimator.layers"),
        (["--grid", "denoiser.layers"], "--grid: give section.key=value,value"),
        (["--seeds", "a"], "--seeds: as in 0,1,2; each must be a whole number, got 'a'"),
        (["--seeds", "0,0"], "--seeds: one is there twice"),
        (["--seeds", "-1"], "--seeds: as in 0,1,2; each must be from 0 to 2147483647, got -1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--prompts", "1"], "--prompts must be at least 2"),
        (["--zero-steps", "0"], "--zero-steps must be at least 1"),
        (["--attacks", "telepathy"], "'telepathy' is unknown"),
        (["--run", "/nowhere"], "--run /nowhere: neither a run"),
        (["--measured", "/nowhere"], "--measured /nowhere: no results.json"),
        (["--run.seed", "3"], "--run.seed: every run has its own"),
        (["--weights", "", "--rows", ","], "--rows: names no row"),
    ],
)
def test_bad_input_runs_nothing(words, message, tmp_path):
    machine = Machine()
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", *words, machine=machine)
    assert not machine.ran and not (tmp_path / "out").exists()
