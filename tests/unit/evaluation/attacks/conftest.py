import pytest

from tests.unit.evaluation.worlds import tiny_trunk


@pytest.fixture(scope="module")
def trunk(trunk_dir):
    return tiny_trunk(trunk_dir)
