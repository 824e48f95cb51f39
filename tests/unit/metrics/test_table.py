import os

import pytest
import torch

from sgt_titan.metrics import table
from sgt_titan.metrics.table import near_duplicates


def test_groups_of_rows_nobody_can_tell_apart():
    torch.manual_seed(0)
    rows = torch.randn(50, 16)
    rows[7] = rows[3]
    rows[20] = rows[3] + 1e-5
    rows[40:45] = rows[40] + 1e-5 * torch.randn(5, 16)
    found = near_duplicates(rows)
    assert found.rows == 8 and found.untrained == 5
    assert found.group_V[[3, 7, 20]].tolist() == [3, 3, 3]
    assert found.group_V[40:45].tolist() == [40] * 5
    alone = [i for i in range(50) if i not in (3, 7, 20, *range(40, 45))]
    assert found.group_V[alone].tolist() == alone


def test_a_table_without_duplicates():
    torch.manual_seed(0)
    found = near_duplicates(torch.randn(100, 8))
    assert (found.rows, found.untrained) == (0, 0) and found.group_V.tolist() == list(range(100))


def test_chunks_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    rows = torch.randn(60, 8)
    rows[50] = rows[2]
    whole = near_duplicates(rows)
    monkeypatch.setattr(table, "CHUNK", 7)
    assert torch.equal(near_duplicates(rows).group_V, whole.group_V)


@pytest.mark.assets
def test_the_asset_model_s_untrained_tokens():
    if "SGT_TITAN_ASSETS" not in os.environ:
        pytest.skip("SGT_TITAN_ASSETS is not set")
    from sgt_titan.transform.trunk_files import TrunkFiles

    files = TrunkFiles(os.path.join(os.environ["SGT_TITAN_ASSETS"], "models", "stories3M-hf"))
    found = near_duplicates(files.embedding_table())
    assert 165 <= found.untrained <= found.rows <= 180
