import pytest

from sgt_titan.transform import glow


class Bytes:
    """A tokenizer of bytes: a character may take several tokens."""

    def decode(self, ids, **options):
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_make_the_text_again():
    text = "a \u00e9\u20acb"
    found = glow.pieces(Bytes(), list(text.encode()))
    assert len(found) == len(text.encode()) and "".join(found) == text
    assert found[2:4] == ["", "\u00e9"]


@pytest.mark.parametrize(("nats", "share"), [(-0.1, 0.0), (0.0, 0.0), (2.0, 0.5), (4.0, 1.0), (400.0, 1.0)])
def test_a_token_is_readable_at_ln_v(nats, share):
    assert glow.level(nats, 4.0) == share
    assert glow.level(nats, 0.0) == 0.0


def test_colours():
    text = glow.terminal(["dark", " bright", "\x1b[31mclear"], [0.0, 9.0, None], 8.0)
    assert f"38;5;{glow.RAMP[0]}mdark" in text and f"{glow.BOLD}\x1b[38;5;{glow.RAMP[-1]}m bright" in text
    assert f"{glow.UNDERLINE}\ufffd[31mclear" in text
    page = glow.page(["<b>", "x", "y"], [0.0, 9.0, None], 8.0)
    assert "&lt;b&gt;" in page and "<b>" not in page and "title='9.0 nats'" in page and "sent in clear" in page
