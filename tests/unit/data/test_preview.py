"""What a row will be to the training, token by token."""

from __future__ import annotations

import re

import pytest

from sgt_titan.data.preview import preview
from sgt_titan.errors import UserError

ROW = {"instruction": "the cat Ann\x1b[2J sat", "output": "on the mat", "pii_units": "Ann", "id": 7}


@pytest.fixture
def shown(write, make_config, tokenizer_dir):
    def show(row=1, color=False, rows=(ROW,), **options):
        config = make_config(write(rows), **options)
        config.trunk.path = tokenizer_dir
        return preview(config, row, color=color)

    return show


def test_every_token_has_its_kind(shown):
    text = shown()
    assert "1 rows, format instruction" in text and "columns not used: id" in text
    # A space may be a token of its own.
    assert re.search(r"<\|im_start\|>user\n\[the cat ?\]\[\[ ?Ann\]\]\[\\x1b\[2J sat\]<\|im_end\|>", text)
    assert "<|im_start|>assistant\n{on the mat<|im_end|>}\n" in text
    colored = shown(color=True)
    assert (
        "\x1b[32mon the mat<|im_end|>\x1b[0m" in colored
        and "\x1b[2J" not in colored
        and "[[" not in colored.split("\n\n")[1]
    )


def test_what_is_cut_and_what_is_left_out(shown):
    text = shown(seq_len=45)
    assert "cut" in text and "~~" in text
    assert "left out of the training: too_long" in shown(seq_len=20, truncation="drop")
    assert "cannot be used: " in shown(rows=[{"messages": []}], format="chat")
    with pytest.raises(UserError, match=r"--row: 2, but .* has rows 1 to 1"):
        shown(row=2)
