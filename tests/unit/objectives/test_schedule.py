import pytest

from sgt_titan.objectives.schedule import weight_at


def test_ramp_is_a_straight_line_between_its_exact_ends():
    values = [weight_at(step, 0.7, 0.1, 4) for step in range(7)]
    assert values[0] == 0.1
    assert values[4:] == [0.7, 0.7, 0.7]
    assert values[1:4] == pytest.approx([0.25, 0.4, 0.55])


@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_no_ramp_is_constant(step):
    assert weight_at(step, 0.3, 99.0, 0) == 0.3


def test_a_ramp_can_fall():
    assert weight_at(1, 0.0, 1.0, 2) == 0.5


def test_before_the_start_is_the_start():
    assert weight_at(-1, 1.0, 0.2, 10) == 0.2
