"""Which names and pages requests may come by: a web page must not reach a proxy through the browser of its user.

A page of another site may send requests to an address of this machine, and read the answers after pointing a name of
its own at it (DNS rebinding). Its requests then carry that name as Host, and its own site as Origin. So on this machine
only names of this machine are served, and pages of other sites never, unless they are listed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

LOCAL = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")


class Origins:
    """``refusal(headers)`` says what is wrong with where a request comes from.

    hosts: further names this proxy is reached by; any_host: it is reached by names nobody listed, and keys protect it.
    origins: of pages that may ask (``https://app.example``).
    """

    def __init__(self, hosts: Sequence[str] = (), origins: Sequence[str] = (), any_host: bool = False):
        self._hosts = {*LOCAL, *(host.lower().rstrip(".") for host in hosts)}
        self._origins, self._any_host = {origin.lower().rstrip("/") for origin in origins}, any_host

    def allows(self, origin: str) -> bool:
        """Whether the page's origin is listed."""
        return origin.lower() in self._origins

    def refusal(self, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        """One line without a word of the request, or None."""
        named = {name: value.decode("latin-1").strip() for name, value in headers}
        host = named.get(b"host")
        if host is not None and not self._any_host and not self._is_ours(host):
            return "this proxy is not reached by that name; --allowed-host names more"
        origin = named.get(b"origin")
        if origin is not None:
            if self.allows(origin):
                return None
            if host is None or _authority(origin) != host.lower():
                return "pages of other sites may not use this proxy; --allowed-origin names some that may"
        elif named.get(b"sec-fetch-site", "none") in ("cross-site", "same-site"):
            return "pages of other sites may not use this proxy; --allowed-origin names some that may"
        return None

    def _is_ours(self, host: str) -> bool:
        name = (_name(host) or "").lower().rstrip(".")
        if name in self._hosts or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)  # an address is no name that somebody could point elsewhere
        except ValueError:
            return False
        return True


def _name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _authority(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
