"""An export that does not fit its trunk or its rows."""

from __future__ import annotations

import json

import pytest

from sgt_titan.data.cache import prepare
from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError
from sgt_titan.evaluation.measure.setting import load_setting


def load(export, config):
    return load_setting(str(export), config, rows=2, corpus=0)


def change(export, **fingerprints):
    settings = json.loads((export / "config.json").read_text())
    settings["fingerprints"] |= fingerprints
    (export / "config.json").write_text(json.dumps(settings))


def test_another_table_is_refused(make_export, demo_config):
    with pytest.raises(UserError, match="embedding table is not that of"):
        load(make_export(0.1, table_change=0.5), demo_config)


def test_an_export_without_table_needs_its_own_trunk(make_export, demo_config):
    export = make_export(0.1, embeddings=False)
    assert len(load(export, demo_config).rows) == 2
    change(export, trunk="0" * 64)
    with pytest.raises(UserError, match="was not trained for"):
        load(export, demo_config)


def test_rows_of_another_split_are_said_to_be_so(demo_config, make_export):
    export = make_export(0.1)
    setting = load(export, demo_config)
    assert not setting.held_out and any("held out" in note for note in setting.notes)
    change(export, data=prepare(demo_config, str(TRUNK), progress=False).fingerprint)
    setting = load(export, demo_config)
    assert setting.held_out and not any("held out" in note for note in setting.notes)
