"""Importing without looking for garbage."""

from __future__ import annotations

import gc

import pytest

from sgt_titan.imports import in_one_go


@pytest.mark.parametrize("was", [True, False])
def test_the_collector_is_as_it_was(was):
    before = gc.isenabled()
    try:
        (gc.enable if was else gc.disable)()
        with pytest.raises(ImportError), in_one_go():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is was
        assert gc.get_freeze_count() == 0 and gc.get_count()[0] < 1000
    finally:
        (gc.enable if before else gc.disable)()
