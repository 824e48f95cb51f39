"""A run's directory, an export in one, and a config's name, where an export, a trunk or data are asked for."""

from __future__ import annotations

from argparse import Namespace

import pytest

from sgt_titan.config.load import find
from sgt_titan.config.origin import settle, trunk_directory
from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("trunk: {path: /models/mine}\ndata: {source: /data/mine.jsonl}\n")
    (tmp_path / "run" / "export" / "config.json").write_text("{}")
    return tmp_path / "run"


def settled(export, trunk=None, data=None) -> tuple[str, str, str]:
    arguments = Namespace(export=str(export), trunk=trunk, data=data)
    settle(arguments)
    return arguments.export, arguments.trunk, arguments.data


def test_a_run_knows_its_export_trunk_and_data(run):
    own = (str(run / "export"), "/models/mine", "/data/mine.jsonl")
    assert settled(run) == settled(run / "export") == own
    assert settled(run, "demo", "alpaca") == (own[0], "demo", "alpaca")
    assert find(str(run)) == run / "config.yaml"  # train, plan, doctor, tables and zero


def test_a_config_s_name_means_its_trunk_or_data(run, monkeypatch):
    monkeypatch.setenv("SGT_TRUNKS", "/trunks")
    assert settled(run, "llama3_70b_64x8", "llama3_70b_64x8")[1:] == ("/trunks/Llama-3.3-70B-Instruct", "openorca")
    monkeypatch.delenv("SGT_TRUNKS")
    assert trunk_directory("demo") == trunk_directory("demo_settled") == str(TRUNK)
    with pytest.raises(UserError, match=r"llama3_70b_64x8: trunk\.path: environment variable SGT_TRUNKS is not set"):
        settled(run, "llama3_70b_64x8")


def test_commands_hand_on_what_the_run_knows(run, tmp_path, monkeypatch):
    """Stopped where each would open what it was told of."""
    from sgt_titan import inspect_command, readings
    from sgt_titan.client import encoder
    from sgt_titan.evaluation.measure import private_values
    from sgt_titan.evaluation.world import samples

    seen: list[tuple] = []

    class Told(Exception):
        pass

    def stop(*args, **kwargs):
        seen.append((*map(str, args), *kwargs.items()))
        raise Told

    text = tmp_path / "text"
    text.write_text("hello")
    export = str(run / "export")
    monkeypatch.setattr(samples, "data_config", stop)
    monkeypatch.setattr(encoder.StainedGlassTransform, "from_pretrained", stop)
    monkeypatch.setattr(private_values, "_finding", lambda arguments, *_: seen.append(("finding", arguments.data)))
    for command, words in (
        (readings.main, [str(run), str(text), "--private", ""]),
        (private_values.main, ["--export", f"mine={run}", "--out", str(tmp_path / "out")]),
        (inspect_command.main, [str(run), str(text)]),
    ):
        with pytest.raises(Told):
            command(words)
    own = (export, "/models/mine", "/data/mine.jsonl", "[]")
    told = (export, ("trunk", "/models/mine"), ("hold_noise", False))
    assert seen == [own, ("finding", "/data/mine.jsonl"), own, told]
    with pytest.raises(UserError, match="--data: is needed, since no --export is a run's"):
        private_values.main(["--out", str(tmp_path / "out")])


def test_what_cannot_be_known_is_asked_for(run, tmp_path):
    (run / "export").rename(tmp_path / "alone")
    with pytest.raises(UserError, match=r"is a run that has not been exported; sgt-titan export"):
        settled(run)
    with pytest.raises(UserError, match=r"--trunk: is needed, since .*alone is neither"):
        settled(tmp_path / "alone")
    with pytest.raises(UserError, match="--data: is needed"):
        settled(tmp_path / "alone", "demo")
