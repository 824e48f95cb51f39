import io
import json

import pytest

from sgt_titan import cli
from sgt_titan.client import Prompt, StainedGlassTransform, read_nearest
from sgt_titan.client.inspect import best_attacker, revealed
from sgt_titan.errors import UserError

TEXT = "the dragon sleeps"
RESULTS = {
    "about": {"rows": 32},
    "mechanisms": {
        "sgt": {
            "best": "inverter",
            "attacks": {"inverter": {"title": "learned inverter", "top1": {"value": 0.5, "low": 0.4, "high": 0.6}}},
        }
    },
}


@pytest.fixture(scope="module")
def clear(identity_export):
    return StainedGlassTransform.from_pretrained(identity_export)


def test_an_identity_is_read_whole(clear):
    prompt = clear.prompt(TEXT)
    reading = read_nearest(clear, prompt, clear.encode(prompt))
    assert reading.text == "<s>" + TEXT and reading.share == 1.0 and reading.hidden == len(TEXT)
    assert reading.tokens == len(TEXT) + 1  # the beginning-of-sequence token is sent in clear


def test_noise_is_not(chat_trunk, tmp_path):
    from tests.serving_kit import make_export

    loud = StainedGlassTransform.from_pretrained(make_export(chat_trunk, tmp_path / "loud", std=9.0))
    prompt = loud.prompt(TEXT)
    reading = read_nearest(loud, prompt, loud.encode(prompt))
    assert reading.share < 0.5 and reading.tokens_right[0]
    nothing = Prompt(prompt.ids, prompt.mask & False)
    reading = read_nearest(loud, nothing, loud.encode(nothing))
    assert reading.hidden == 0 and reading.share != reading.share and reading.text == "<s>" + TEXT


def test_what_is_revealed(clear, chat_trunk, tmp_path):
    """An identity tells every token; noise like the prior tells far less; what is sent in clear has no price."""
    from tests.serving_kit import make_export

    prompt = clear.prompt(TEXT)
    told = revealed(clear, prompt)
    assert "".join(told.pieces) == "<s>" + TEXT and told.nats[0] is None
    assert min(told.nats[1:]) > told.log_vocab and told.total == pytest.approx(sum(told.nats[1:]))
    loud = StainedGlassTransform.from_pretrained(make_export(chat_trunk, tmp_path / "loud", std=1.0))
    assert revealed(loud, prompt).total < told.total / 10


def test_the_text_as_a_page(identity_export, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    command = ["inspect", str(identity_export), str(tmp_path / "text"), "--html", str(tmp_path / "page.html")]
    assert cli.main([*command, "--color", "always"]) == 0
    out, html = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert "\x1b[1m\x1b[38;5;226m" in out and "\x1b[4m<s>" in out and "nats in all" in out
    assert html.count("<span") == len(TEXT) and "&lt;s&gt;" in html and "<script" not in html
    assert cli.main(command) == 0
    assert "\x1b" not in (out := capsys.readouterr().out) and "most nats: " in out
    assert cli.main([*command[:3], "--html", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "--html: cannot write" in capsys.readouterr().err


def test_command(identity_export, tmp_path, capsys, monkeypatch):
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    command = ["inspect", str(identity_export), str(tmp_path / "text")]
    assert cli.main([*command, "--results", str(tmp_path / "results.json")]) == 0
    out = capsys.readouterr().out
    assert TEXT in out and "17 of 17 obfuscated tokens right (100.0%)" in out
    assert "learned inverter): reads 50.0% of the hidden tokens (95% interval 40.0 to 60.0, 32 prompts)" in out
    assert "the weakest observer" in out
    messages = json.dumps([{"role": "user", "content": TEXT}]).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(messages)))
    assert cli.main(["inspect", str(identity_export), "--messages", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nearest_neighbour_reads"] == f"<s><user>{TEXT}</><assistant>"
    assert "not measured" in found["best_attacker"]


def test_bad_input(identity_export, tmp_path, capsys):
    (tmp_path / "bytes").write_bytes(b"Zorblax \xff")
    (tmp_path / "text").write_text("Zorblax")
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "results.json").write_text('{"about": 1}')
    for words, message in (
        ([str(tmp_path / "missing")], "cannot be read"),
        ([str(tmp_path / "bytes")], "not valid UTF-8"),
        ([str(tmp_path / "text"), "--messages"], "not JSON"),
        ([str(tmp_path / "deep"), "--messages"], "not JSON"),
        ([str(tmp_path / "text"), "--results", str(tmp_path / "results.json")], "not the results.json"),
    ):
        assert cli.main(["inspect", str(identity_export), *words]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and "Zorblax" not in err
    with pytest.raises(UserError, match="cannot be read"):
        best_attacker(tmp_path / "missing")
