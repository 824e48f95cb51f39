"""What several command lines check."""

import pytest

from sgt_titan.arguments import http_url


def test_http_url():
    parts = http_url("https://[::1]:8000/v1")
    assert (parts.scheme, parts.hostname, parts.port) == ("https", "::1", 8000)
    assert http_url("http://host").port is None


@pytest.mark.parametrize("text", ["host:8000", "ftp://host", "http://", "http://[::1", "http://x:y", "http://x:70000"])
def test_no_http_url(text):
    assert http_url(text) is None
