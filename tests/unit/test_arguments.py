"""What several command lines check."""

import pytest

from sgt_titan.arguments import Parser, http_url, number, seed_argument
from sgt_titan.errors import UserError


def test_http_url():
    parts = http_url("https://[::1]:8000/v1")
    assert (parts.scheme, parts.hostname, parts.port) == ("https", "::1", 8000)
    assert http_url("http://host").port is None


@pytest.mark.parametrize("text", ["host:8000", "ftp://host", "http://", "http://[::1", "http://x:y", "http://x:70000"])
def test_no_http_url(text):
    assert http_url(text) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rows 1", "--rows must be at least 2, got 1"),
        ("--samples 1", "--rows must be at least 2, got 1"),
        ("--rows 2.5", "--rows must be a whole number, got '2.5'"),
        ("--hours 0", "--hours must be above 0, got 0"),
        ("--hours inf", "--hours must be above 0, got inf"),
        ("--hours nan", "--hours must be above 0, got nan"),
        ("--hours x", "--hours must be a number, got 'x'"),
        ("--seed 2147483648", "--seed must be from 0 to 2147483647, got 2147483648"),
        ("--row 2", "unrecognized arguments: --row 2 (see it --help)"),
        ("--rows", "argument --rows/--samples: expected one argument (see it --help)"),
    ],
)
def test_numbers_of_a_range(words, said):
    parser = Parser(prog="it")
    parser.add_argument("--rows", "--samples", type=number(int, 2))
    parser.add_argument("--hours", type=number(float, above=0))
    seed_argument(parser, "chance")
    assert vars(parser.parse_args(["--rows", "2", "--hours", "0.5"])) == {"rows": 2, "hours": 0.5, "seed": 0}
    with pytest.raises(UserError) as error:
        parser.parse_args(words.split())
    assert str(error.value) == said
