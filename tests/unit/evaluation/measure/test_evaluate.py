"""The command from an export to a report, interrupted, gone on with, and refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from sgt_titan.config.load import dump
from sgt_titan.conjformer.command import convert
from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError
from sgt_titan.evaluation.attacks import ATTACKS
from sgt_titan.evaluation.measure import evaluate, runner, workers
from sgt_titan.evaluation.measure.suite import EXACT, SUITES, battery
from sgt_titan.evaluation.world.threat import Cost, Size
from sgt_titan.transform.trunk_files import TrunkFiles

ATTACKED = "nearest_l2,mrp,known_plaintext,map_search"


@pytest.fixture(scope="module")
def export(make_export, demo_config):
    """Noise of a third of the table's std, and the run's config beside it."""
    path = make_export(0.3)
    (path.parent / "config.yaml").write_text(dump(demo_config))
    return path


def words(export, out, *more):
    return [
        str(export),
        "--trunk",
        "demo",
        "--data",
        "demo",
        "--out",
        str(out),
        "--rows",
        "4",
        "--attacks",
        ATTACKED,
        "--zero-steps",
        "10",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(export, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    assert evaluate.main(words(export, out)) == 0
    return out


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text())


def test_every_number_has_its_n_and_interval(results):
    def estimates(value, where=""):
        if isinstance(value, dict):
            if {"value", "low", "high", "n"} == set(value):
                yield where, value
            else:
                for key, inner in value.items():
                    yield from estimates(inner, f"{where}/{key}")
        elif isinstance(value, list):
            for inner in value:
                yield from estimates(inner, where)

    found = dict(estimates(results))
    assert len(found) > 100
    for where, estimate in found.items():
        if isinstance(estimate["value"], float) and estimate["n"]:
            assert estimate["low"] <= estimate["value"] <= estimate["high"], where
    about = results["about"]
    prints = ("data_fingerprint", "export_fingerprint", "trunk_fingerprint")
    for key in ("command", "date", "seed", "versions", "hidden_tokens", *prints):
        assert about[key] not in (None, "", {}), key
    assert about["rows"] == 4 and about["marked_spans"] > 0


def test_what_is_known_of_this_export(results):
    """It adds constant noise and nothing else: it is the noise baseline, and a MAP attack reads what theory says."""
    sgt, noise = results["mechanisms"]["sgt"], results["mechanisms"]["noise"]
    assert sgt["facts"]["std"] == pytest.approx(noise["facts"]["std"], rel=1e-3) == pytest.approx(0.3, rel=1e-3)
    assert sgt["privacy"]["nn_fr"]["value"] == pytest.approx(noise["privacy"]["nn_fr"]["value"], abs=0.05)
    assert sgt["attacks"]["map_search"]["top1"]["value"] > 0.95
    single = [name for name, part in sgt["attacks"].items() if part["kind"] == "single"]
    assert len(sgt["not_run"]) > 5 and not {part["title"] for part in sgt["attacks"].values()} & {*sgt["not_run"]}
    assert sgt["best"] == max(single, key=lambda name: sgt["attacks"][name]["top1"]["value"])
    assert results["mechanisms"]["none"]["utility"]["kept"]["value"] == pytest.approx(1.0)
    redaction = results["mechanisms"]["redaction"]["attacks"]["nearest_l2"]
    assert redaction["marked_top1"]["value"] < 0.2 < 0.5 < redaction["top1"]["value"] < 1.0
    assert set(redaction["pii"]) == {"exact_micro", "exact_macro", "fuzzy_micro", "fuzzy_macro"}
    assert set(sgt["attacks"]) == set(ATTACKED.split(","))
    assert set(results["mechanisms"]["none"]["attacks"]) == set(EXACT) & set(ATTACKED.split(","))


def test_the_same_command_again_measures_nothing_and_says_the_same(export, finished, results, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in (finished / "parts").iterdir()}
    assert evaluate.main(words(export, finished)) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (finished / "parts").iterdir()} == before
    again = json.loads((finished / "results.json").read_text())
    assert again["mechanisms"] == results["mechanisms"]
    assert "parts are there already" in capsys.readouterr().err


def test_an_interrupted_one_goes_on_to_the_same_numbers(export, finished, results, tmp_path, monkeypatch):
    """Killed in the middle: parts that were finished are kept, the others measured, the result is the same."""
    out = tmp_path / "out"
    original, count = runner.Parts.put, []

    def put(self, name, part):
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(name)
        original(self, name, part)

    monkeypatch.setattr(runner.Parts, "put", put)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(words(export, out, "--no-baselines"))
    assert len(list((out / "parts").iterdir())) == 5 and not (out / "results.json").exists()
    monkeypatch.setattr(runner.Parts, "put", original)
    assert evaluate.main(words(export, out, "--no-baselines")) == 0
    again = json.loads((out / "results.json").read_text())

    def numbers(found):
        for attack in found["mechanisms"]["sgt"]["attacks"].values():
            attack.pop("seconds", None)
        return found["mechanisms"]["sgt"]

    assert numbers(again) == numbers(json.loads(json.dumps(results)))


def test_more_attacks_may_be_added_later(export, finished):
    more = words(export, finished)
    more[more.index(ATTACKED)] = ATTACKED + ",farthest"
    assert evaluate.main(more) == 0
    assert "farthest" in json.loads((finished / "results.json").read_text())["mechanisms"]["sgt"]["attacks"]


def test_more_benchmarks_may_be_added_later(export, finished, monkeypatch):
    """Each is a part of its own, and those of another source are other parts."""
    asked = []

    def run_benchmarks(trunk, tokenizer, mechanism, names, *, local_dir, limit, seed, **_):
        asked.append((mechanism.name, *names, bool(local_dir)))
        estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 50}
        return {name: {"accuracy": estimate, "shots": 0, "chance": 0.25, "scores": []} for name in names}

    monkeypatch.setattr("sgt_titan.evaluation.scores.benchmarks.run_benchmarks", run_benchmarks)
    for names in ("piqa", "arc_easy,piqa"):
        assert evaluate.main(words(export, finished, "--no-baselines", "--benchmarks", names)) == 0
        found = json.loads((finished / "results.json").read_text())["mechanisms"]["sgt"]["benchmarks"]
        assert list(found) == names.split(",")
    assert asked == [("sgt", "piqa", False), ("sgt", "arc_easy", False)]


def test_another_trunk_with_the_same_table_is_another_evaluation(export, finished, tmp_path):
    trunk = tmp_path / "trunk"
    shutil.copytree(TRUNK, trunk)
    tensors = load_file(trunk / "model.safetensors")
    save_file(
        {name: tensor if "embed" in name else 2 * tensor for name, tensor in tensors.items()},
        trunk / "model.safetensors",
        metadata={"format": "pt"},
    )
    call = words(export, finished)
    call[call.index("--trunk") + 1] = str(trunk)
    with pytest.raises(UserError, match=r"another configuration \(trunk is"):
        evaluate.main(call)


def test_another_rotation_in_the_same_place_is_another_evaluation(export, tmp_path):
    server, out = tmp_path / "server", tmp_path / "out"
    call = words(export, out, "--no-baselines", "--rotated", f"{server},{server}-client,{tmp_path / 'key'}")
    call[call.index(ATTACKED)] = "norm_matching"
    for _ in range(2):
        for made in tmp_path.glob("server*"):
            shutil.rmtree(made)
        (tmp_path / "key").unlink(missing_ok=True)
        assert convert([str(TRUNK), str(server), "--secret", str(tmp_path / "key")]) == 0
        if not out.exists():
            assert evaluate.main(call) == 0
    about = json.loads((out / "results.json").read_text())["about"]
    assert about["rotated_fingerprint"] != TrunkFiles(server).fingerprint()
    with pytest.raises(UserError, match=r"another configuration \(rotated is"):
        evaluate.main(call)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "3"], "another configuration .seed is 0 there, 3 here"),
        (["--seed", "-1"], "--seed must be from 0 to 2147483647"),
        (["--seed", "2147483648"], "--seed must be from 0 to 2147483647"),
        (["--rows", "1"], "--rows must be at least 2"),
        (["--examples", "-1"], "--examples must be at least 0, got -1"),
        (["--attacks", "nearest_l2,telepathy"], "'telepathy' is unknown; there are nearest_l2"),
        (["--judge", "http://x"], "--judge and --judge-model"),
        (["--judge", "localhost:8000/v1", "--judge-model", "m"], "--judge: give http://HOST/v1"),
        (["--judge", "http://[::1/v1", "--judge-model", "m"], "--judge: give http://HOST/v1"),
        (["--judge", "http://user:secret@x/v1", "--judge-model", "m"], r"--judge: give [^@]*OPENAI_API_KEY$"),
        (["--benchmarks", "arc_hard"], "'arc_hard' is unknown; there are arc_challenge"),
        (["--benchmark-dir", "/nowhere"], "--benchmark-dir without --benchmarks"),
        (["--benchmarks", "piqa", "--benchmark-dir", "."], r"llmfoundry_piqa\.jsonl is missing"),
        (["--memory", "0.001"], r"needs about .* GiB.*take fewer --rows, a smaller --suite"),
        (["--attacks", "nearest_cosine", "--minutes", "1e-9"], "--minutes 1e-09: this would take about"),
        (["--zero-steps", "0"], "--zero-steps must be at least 1, got 0"),
        (["--zero-steps", "11"], "another configuration .zero_steps is 10 there, 11 here"),
        (["--minutes", "-1"], "--minutes must be above 0, got -1"),
        (["--optimizer.lr", "1"], "does not belong"),
    ],
)
def test_bad_input_changes_nothing(export, finished, more, message):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        evaluate.main(words(export, finished, *more))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_an_export_of_another_trunk_is_refused(make_export, tmp_path, demo_config):
    other = make_export(0.1, table_change=0.5)
    (other.parent / "config.yaml").write_text(dump(demo_config))
    with pytest.raises(UserError, match="its embedding table is not that of"):
        evaluate.main(words(other, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_marked_values_that_are_not_in_the_text(make_export, tmp_path, demo_config):
    rows = [{"instruction": f"say {i} times please", "output": "it is done", "pii_units": "Zebedee"} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data.validation_samples", "4", "--data.cache_dir", str(tmp_path / "cache")]
    call = words(make_export(0.1), tmp_path / "out", *options)
    call[call.index("demo", call.index("--data"))] = str(file)
    with pytest.raises(UserError, match=r"none of its 40 marked private values .* is in its prompts"):
        evaluate.main(call)
    assert not (tmp_path / "out").exists()


def test_estimate_runs_nothing(export, tmp_path, capsys):
    assert evaluate.main(words(export, tmp_path / "out", "--estimate")) == 0
    printed = capsys.readouterr()
    assert "sgt/attacks/map_search" in printed.out and " s " in printed.out and "GiB" in printed.err
    assert not (tmp_path / "out").exists()


def test_a_budget_names_what_does_not_fit():
    jobs = [runner.Job("a", dict, Cost(1e9, 1e6), 1.0), runner.Job("b", dict, Cost(1e15, 5e12), 60.0)]
    with pytest.raises(UserError, match=r"b: needs about 4656\.6 GiB"):
        runner.check_memory(jobs, 1.0)
    with pytest.raises(UserError, match="b the longest"):
        runner.check_time(jobs, 0.001)
    assert runner.check_memory([], 1) == runner.check_time([], 1) == 0.0
    # Two at a time hold both, and the models once more; and take as long as the longest.
    assert runner.check_memory(jobs, 1e6, 2, models=7.0) == 5e12 + 1e6 + 7.0
    assert runner.check_time(jobs, 2, 2) == 60.0 and runner.check_time(jobs, 2) == 61.0


def test_an_estimate_adds_up_what_a_part_does():
    speed = runner.Speed(passing=2.0, training=4.0, step=10.0, number=0.5)
    seconds = {
        name: speed.seconds(runner.Job(f"sgt/attacks/{name}", dict, Cost(8.0, 1.0, 2.0, 4.0))) for name in ATTACKS
    }
    assert seconds["map_search"] == 4.0 + 20.0 + 2.0 and seconds["inverter"] == 2.0 + 20.0 + 2.0
    size = Size(rows=20, tokens=800, longest=50, width=64, vocab=500, trunk=10**6, transform=10**5, answered=100)
    flops = {name: ATTACKS[name].cost(size, **ATTACKS[name].arguments("standard")).flops for name in runner.TRAINED}
    assert flops["guess"] < flops["sequence"] < flops["sequence_repeats"] and flops["guess"] < flops["answer"]
    assert flops["sequence_at_z"] < flops["sequence"] / 1.9  # who goes on does half of the steps


def test_two_processes_measure_the_same(export, results, tmp_path):
    out = tmp_path / "out"
    assert evaluate.main(words(export, out, "--jobs", "2")) == 0
    found = json.loads((out / "results.json").read_text())

    def without_time(value):
        if isinstance(value, dict):
            return {key: without_time(inner) for key, inner in value.items() if key != "seconds"}
        return [without_time(inner) for inner in value] if isinstance(value, list) else value

    assert without_time(found["mechanisms"]) == without_time(results["mechanisms"])
    assert without_time(found["no_prompt"]) == without_time(results["no_prompt"])


def refusing(*_):
    def run():
        raise UserError("this part is refused")

    return [runner.Job("a", run, Cost(1.0, 1.0)), runner.Job("b", dict, Cost(1.0, 1.0), 1.0)]


def dying(*_):
    return [runner.Job("a", lambda: os._exit(9), Cost(1.0, 1.0))]


def in_a_row(folder):
    """The shorter one first: the other goes on from it."""

    def last():
        return {"there": (folder / "first").exists()}

    def first():
        (folder / "first").touch()
        return {}

    return [
        runner.Job("last", last, Cost(1.0, 1.0), 9.0, after="first"),
        runner.Job("other", dict, Cost(1.0, 1.0), 8.0, after="not measured now"),
        runner.Job("first", first, Cost(1.0, 1.0), 1.0),
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_nobody_begins_before_what_he_goes_on_from(tmp_path, count):
    found = [(job.name, part) for job, part, _ in workers.several(in_a_row(tmp_path), count, in_a_row, (tmp_path,))]
    assert sorted(name for name, _ in found) == ["first", "last", "other"] and dict(found)["last"] == {"there": True}


@pytest.mark.parametrize(
    ("build", "words"), [(refusing, "^this part is refused$"), (dying, r"--jobs 1: a process that measured a ended")]
)
def test_what_a_process_says_is_said(build, words):
    with pytest.raises(UserError, match=words):
        list(workers.several(build(), 1, build, ()))


def test_a_glance_meets_the_nearest_neighbour_alone():
    assert list(battery("glance", "sgt", denoises=True)) == list(battery("glance", "noise")) == ["nearest_l2"]


@pytest.mark.parametrize("suite", [suite for suite in SUITES if suite != "glance"])
def test_suites(suite):
    """The SGT meets every attack; what is left out on baselines leaves the exact ones."""
    here = {name for name, attack in ATTACKS.items() if suite in attack.effort}
    long = {"autoregressive", "sequence_repeats", "sequence_at_z", "map_search_at_z"}
    assert here | long == set(ATTACKS)  # which take too long for the smallest
    assert set(battery(suite, "sgt", denoises=True)) == here
    assert set(battery(suite, "sgt")) == here - {"sequence_at_z", "map_search_at_z"}  # z is what is sent
    assert set(battery(suite, "none")) == set(EXACT)
    there = SUITES[suite]
    made = {f"noise-{sigma:g}" for sigma in there.sigmas}
    made |= {f"{way}-{100 * share:g}" for way in ("dropping", "choosing") for share in there.drops}
    assert "choosing-30" in there.read and made.issuperset(there.read)  # what is left out is guessed from the rest
    assert set(battery(suite, "choosing-30")) == {*EXACT, "sequence"}
    assert set(battery(suite, "sgt", ["mrp"])) == {"mrp"}


def test_no_prompt_in_the_log(export, tmp_path, capsys, results):
    """Prompts are in the results, on purpose; never in what the command says of its progress."""
    out = tmp_path / "out"
    evaluate.main(words(export, out, "--examples", "0", "--no-baselines"))
    found = json.loads((out / "results.json").read_text())
    assert found["mechanisms"]["sgt"]["examples"] == []
    everything = capsys.readouterr()
    prompt = results["mechanisms"]["sgt"]["examples"][0]["prompt"]
    assert len(prompt) > 40 and prompt[:40] not in everything.out + everything.err + (out / "report.html").read_text()
