"""Which key each upstream gets.

A key of the environment does not say whom it is for, and sent to another provider it is given away. So of itself it
goes to one origin (scheme, host, port) only; a config with several says which of its servers get it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sgt_titan.arguments import http_url
from sgt_titan.errors import UserError
from sgt_titan.serving.options import UpstreamOptions

VARIABLE = "SGT_TITAN_UPSTREAM_API_KEY"
_PORTS = {"http": 80, "https": 443}


def upstream_keys(upstreams: Sequence[UpstreamOptions]) -> dict[UpstreamOptions, str | None]:
    """The key of every server: of its file, of the variable it names, or of ``VARIABLE``; None: it gets none.

    Raises UserError for a file or variable that holds no key, and for a ``VARIABLE`` that could be for several origins.
    """
    unsaid = [upstream for upstream in upstreams if upstream.api_key_file is None and upstream.api_key_env is None]
    given = os.environ.get(VARIABLE, "") if unsaid else ""
    shared = _one(given, VARIABLE) if given.strip() else None
    origins = sorted({_origin(upstream.url) for upstream in upstreams})
    if len(origins) > 1:
        if shared and all(upstream.api_key_env != VARIABLE for upstream in upstreams):
            raise UserError(
                f"{VARIABLE}: is set, and could be for {' or '.join(origins[:3])}: say which gets it, "
                f'api_key_env = "{VARIABLE}" beside its url in --config (who says nothing then gets no key), '
                "or give every server an api_key_file; --upstream-api-key-file is for all of --upstream"
            )
        shared = None
    return {upstream: shared if upstream in unsaid else _own(upstream) for upstream in upstreams}


def _own(upstream: UpstreamOptions) -> str:
    file, variable = upstream.api_key_file, upstream.api_key_env
    if file is None:
        assert variable is not None
        return _one(os.environ.get(variable, ""), f"{upstream.url}: api_key_env: {variable}")
    if variable is not None:
        raise UserError(f"{upstream.url}: api_key_file and api_key_env: give one of them")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__})") from None
    return _one(text, f"{file}: as an upstream's key")


def _one(text: str, where: str) -> str:
    """The key that ``text`` is. Raises UserError, which never repeats it."""
    keys = text.split()
    if len(keys) != 1:
        raise UserError(f"{where}: holds {len(keys)} keys, expected one")
    if not (keys[0].isascii() and keys[0].isprintable()):
        raise UserError(f"{where}: a key is not ASCII")
    return keys[0]


def _origin(url: str) -> str:
    parts = http_url(url)
    if parts is None:
        raise UserError(f"--upstream: {url!r} is no URL; give http(s)://host[:port]")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or _PORTS[parts.scheme]}"
