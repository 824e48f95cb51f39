"""``sgt-titan private``: what is found and left, and what attackers read of the values."""

import json

import pytest

from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError
from sgt_titan.evaluation.measure import private_values
from sgt_titan.evaluation.measure.private_values import main


def test_finding_alone(tmp_path, capsys):
    assert main(["--data", "demo", "--rows", "12", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "private.json").read_text())
    assert results["finding"]["told"]["recall"]["value"] > 0.95 > results["finding"]["found"]["recall"]["value"] > 0.5
    assert (tmp_path / "private.md").read_text().strip() == capsys.readouterr().out.strip()
    assert (tmp_path / "private.svg").read_text().startswith("<svg")


def test_mechanisms(tmp_path, make_export, monkeypatch):
    monkeypatch.setattr(private_values, "GENERATED", 4)
    export = make_export(0.3)
    words = ["--data", "demo", "--rows", "4", "--corpus", "8", "--trunk", str(TRUNK), "--export", f"x={export}"]
    words += [
        "--zero-steps",
        "1",
        "--attacks",
        "nearest_l2",
        "--data.max_samples",
        "240",
        "--data.validation_samples",
        "24",
    ]
    words += ["--own", str(TRUNK.parent / "private.yaml"), "--out", str(tmp_path / "out")]
    assert main([*words, "--data.cache_dir", str(tmp_path / "cache"), "--data.template", "chat"]) == 0
    found = json.loads((tmp_path / "out" / "private.json").read_text())["mechanisms"]
    leak = {name: entry["attacks"]["nearest_l2"]["pii"]["exact_micro"]["value"] for name, entry in found.items()}
    assert leak["none"] == 1.0 and leak["redaction"] == 0.0 and leak["marked"] < 0.05
    assert leak["marked"] <= leak["surrogates"] < leak["x"]
    assert leak["marked+x"] <= leak["surrogates+x"] <= leak["x"]
    assert found["none"]["answers"]["value"] >= found["marked"]["answers"]["value"]
    assert found["marked"]["utility"]["kl"]["value"] < found["redaction"]["utility"]["kl"]["value"]
    assert leak["placeholders_marked"] <= leak["placeholders"] < 1.0
    assert found["placeholders"]["utility"]["kl"]["value"] > found["surrogates"]["utility"]["kl"]["value"]
    # Again it goes on: what is there is not measured again; and another measurement is refused.
    monkeypatch.setattr(private_values, "_attack", None)
    (tmp_path / "out" / "private.json").unlink()
    again = [*words, "--data.cache_dir", str(tmp_path / "cache"), "--data.template", "chat"]
    assert main(again) == 0
    assert json.loads((tmp_path / "out" / "private.json").read_text())["mechanisms"] == found
    assert main([*again, "--mechanisms", "x"]) == 0
    assert json.loads((tmp_path / "out" / "private.json").read_text())["mechanisms"].keys() == {"redaction", "x"}
    assert main([*again, "--mechanisms", "marked,surrogates+x"]) == 0  # nothing to begin a line with, and half of one
    assert (tmp_path / "out" / "private.svg").read_text().startswith("<svg")
    with pytest.raises(UserError, match="--mechanisms: 'y' is none; known: none, redaction"):
        main([*again, "--mechanisms", "y"])
    with pytest.raises(UserError, match="of another configuration"):
        main([*again, "--seed", "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "demo", "--export", "x=y"], "--trunk: is needed"),
        (["--data", "demo", "--trunk", "demo"], "needs an --export"),
        (["--data", "demo", "--trunk", "demo", "--export", "x"], "NAME=DIR"),
        (["--data", "demo", "--rows", "1"], "at least 2"),
        (["--data", "demo", "--finders", "nonsense"], "no finder"),
        (["--data", "demo", "--data.template", "chat"], "go with --trunk"),
    ],
)
def test_bad_input(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_source_without_marks(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"instruction": "a b", "output": "c"}\n' * 4)
    with pytest.raises(UserError, match="none of its first"):
        main(["--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "out")])
