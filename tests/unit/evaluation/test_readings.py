"""``sgt-titan readings``: what is written, sent, seen, read, and what comes back."""

import pytest

from sgt_titan import cli
from sgt_titan.demo import TRUNK
from sgt_titan.demo.run import LETTER, OWN


def test_who_reads_what(make_export, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text(LETTER)
    words = ["readings", str(make_export(0.01)), str(tmp_path / "letter.txt"), "--trunk", str(TRUNK), "--data", "demo"]
    words += ["--private-own", str(OWN), "--max-tokens", "24", "--data.max_samples", "240", "--data.template", "chat"]
    assert cli.main([*words, "--data.cache_dir", str(tmp_path / "cache"), "--data.validation_samples", "24"]) == 0
    wrote, sent, seen, read, back, shown = capsys.readouterr().out.strip().split("\n\n")
    assert "Ella Nellakin" in wrote and "4 values found" in sent
    for text in (sent, seen, read, back):
        assert not any(value in text for value in ("Ella", "Nellakin", "694.33", "4327", "863504"))
    assert "100%" in read, "hardly any noise: the surrogates are read, and they say nothing"
    assert "Ella" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--private", "nonsense"], "no finder"),
        (["--max-tokens", "0"], "at least 1"),
        (["--private-own", "/none"], "cannot be read"),
        ([], "cannot be read as text"),
    ],
)
def test_bad_input(words, message, tmp_path, capsys):
    base = ["readings", "e", str(tmp_path / "none"), "--trunk", "demo", "--data", "demo"]
    assert cli.main([*base, *words]) == 2 and message in capsys.readouterr().err
