import sys

import pytest

from sgt_titan.demo import run as demo


def recorder(codes=None, effect=None):
    """A stand-in for the commands: records them, returns ``codes`` by command."""
    calls = []

    def execute(words):
        calls.append(list(words))
        if effect:
            effect(words)
        return (codes or {}).get(words[0], 0)

    return calls, execute


def exported(out):
    (out / "export").mkdir(parents=True, exist_ok=True)
    (out / "export" / "config.json").write_text("{}")
    (out / "run.json").write_text("{}")


def test_trains_then_reports(tmp_path, capsys):
    out = tmp_path / "demo"
    calls, execute = recorder(effect=lambda words: exported(out) if words[0] == "train" else None)
    assert demo.run(out, overrides=["--training.steps", "3"], execute=execute) == 0
    assert calls[0] == ["train", "demo", "--run.output_dir", str(out), "--training.steps", "3"]
    assert calls[1][:2] == ["report", str(out / "export")]
    assert calls[2][:3] == ["readings", str(out / "export"), str(out / "letter.txt")] and len(calls) == 3
    assert (out / "letter.txt").read_text().startswith("Hello, my name is")
    assert f"--logdir {out}/tb" in capsys.readouterr().out


def test_exports_what_an_interrupted_run_did_not(tmp_path):
    calls, execute = recorder()
    assert demo.run(tmp_path, execute=execute) == 0
    assert [words[0] for words in calls] == ["train", "export", "report", "readings"]


@pytest.mark.parametrize("failing", ["train", "export", "report", "readings"])
def test_stops_at_the_first_failure_with_its_code(tmp_path, failing, capsys):
    calls, execute = recorder({failing: 7})
    assert demo.run(tmp_path, execute=execute) == 7
    assert calls[-1][0] == failing
    assert "Left behind" not in capsys.readouterr().out


def test_fresh_deletes_a_run_and_nothing_else(tmp_path):
    out = tmp_path / "demo"
    exported(out)
    _, execute = recorder()
    assert demo.run(out, fresh=True, execute=execute) == 0
    assert not (out / "run.json").exists()
    (out / "letter.txt").unlink()
    (out / "thesis.tex").write_text("years of work")
    assert demo.main(["--out", str(out), "--fresh"]) == 2
    assert (out / "thesis.tex").is_file()


def test_execute_is_the_command_line_under_this_interpreter(capfd):
    assert demo.execute(["--version"]) == 0
    assert demo.execute(["no-such-command"]) == 2
    shown = capfd.readouterr()
    assert "$ sgt-titan --version" in shown.out and "sgt-titan: error" in shown.err
    assert sys.executable
