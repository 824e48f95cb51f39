"""Variables in paths."""

from __future__ import annotations

import os

import pytest

from sgt_titan.config.paths import expand
from sgt_titan.errors import UserError


def test_variables_and_home(monkeypatch):
    monkeypatch.setenv("SGT_TEST_DIR", "/d")
    assert expand("$SGT_TEST_DIR/${SGT_TEST_DIR}x", "k") == "/d//dx"
    assert expand("~/x", "k") == os.path.expanduser("~/x")
    assert expand("", "k") == ""


def test_what_is_not_set_and_what_would_be_expanded_again(monkeypatch):
    monkeypatch.delenv("SGT_NO", raising=False)
    with pytest.raises(UserError, match=r"^data\.cache_dir: environment variable SGT_NO is not set"):
        expand("$SGT_NO/x", "data.cache_dir")
    monkeypatch.setenv("SGT_TEST_DIR", "/d/$HOME")
    with pytest.raises(UserError, match="still holds a"):
        expand("$SGT_TEST_DIR", "k")
