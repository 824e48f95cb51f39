"""Who may ask, and how much: keys, their names and limits, read again when their file changes.

A file of keys is either plain, one key a line, or TOML with a table a name:

    [keys.billing]
    key = "..."              # or sha256 = "..." (hexadecimal, of the key), so that the file holds none
    active = 4               # requests answered at a time
    requests_per_minute = 60
    tokens_per_minute = 100000   # prompt and answer
    models = ["llama"]       # what it may ask; left out: all
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from sgt_titan.errors import UserError

LOG = logging.getLogger("sgt_titan.serving")
MIN_KEY = 16
LOOK_AGAIN_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Key:
    """A client. None: no limit of its own."""

    name: str
    digest: bytes = field(repr=False)
    active: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    models: tuple[str, ...] | None = None


ANYBODY = Key("anybody", b"")


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def plain_keys(keys: Iterable[str], where: str) -> tuple[Key, ...]:
    """Keys without names or limits. Raises UserError for one that is too short, or no ASCII."""
    found = []
    for i, key in enumerate(keys, 1):
        if not key.isascii():
            raise UserError(f"{where}: a key is not ASCII; one a line, nothing else")
        if len(key) < MIN_KEY:
            raise UserError(f"{where}: at least {MIN_KEY} characters each; make one with `openssl rand -hex 24`")
        found.append(Key(f"key-{i}", digest(key)))
    return tuple(found)


def read_keys(path: str | Path) -> tuple[Key, ...]:
    """The keys of a file. Raises UserError, which names tables and fields and never a key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    if path.suffix != ".toml":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise UserError(f"{path}: holds no key; one a line")
        return plain_keys(lines, f"API keys in {path}")
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # its words may hold a line of the file
        raise UserError(f"{path}: is not valid TOML") from None
    tables = content.get("keys")
    if content.keys() != {"keys"} or not isinstance(tables, dict) or not tables:
        raise UserError(f"{path}: must hold tables [keys.NAME] and nothing else")
    found = tuple(_key(name, table, path) for name, table in tables.items())
    if len({key.digest for key in found}) < len(found):
        raise UserError(f"{path}: two names have the same key")
    return found


def _key(name: str, table: object, path: Path) -> Key:
    where = f"{path}: keys.{name}" if _NAME.fullmatch(name) else f"{path}: a name in keys"
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: must be 1 to 64 letters, digits, '.', '_' and '-', since it is logged")
    if not isinstance(table, dict):
        raise UserError(f"{where}: must be a table")
    known = {f.name for f in fields(Key)} - {"name", "digest"}
    unknown = table.keys() - known - {"key", "sha256"}
    if unknown:
        raise UserError(f"{where}: {len(unknown)} unknown fields; known are {', '.join(sorted(known))}, key, sha256")
    key, sha256 = table.get("key"), table.get("sha256")
    if (key is None) == (sha256 is None) or not isinstance(key or sha256, str):
        raise UserError(f"{where}: give either key or sha256, as text")
    if key is not None:
        identity = plain_keys([key], where)[0].digest
    elif re.fullmatch("[0-9a-fA-F]{64}", str(sha256)):
        identity = bytes.fromhex(str(sha256))
    else:
        raise UserError(f"{where}.sha256: must be 64 hexadecimal digits")
    limits = {}
    for limit in ("active", "requests_per_minute", "tokens_per_minute"):
        value = table.get(limit)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{where}.{limit}: must be a whole number of at least 1")
        limits[limit] = value
    models = table.get("models")
    if models is not None and not (isinstance(models, list) and models and all(isinstance(m, str) for m in models)):
        raise UserError(f"{where}.models: must be a list of names")
    return Key(name, identity, **limits, models=None if models is None else tuple(models))


class KeyRing:
    """Which key a header holds. A file is read again when it has changed; one that cannot be used changes nothing, and
    the log says so."""

    def __init__(self, keys: Sequence[Key] = (), file: str | Path | None = None):
        self._fixed, self._file = tuple(keys), None if file is None else Path(file)
        self._read: tuple[Key, ...] = () if self._file is None else read_keys(self._file)
        self._stamp, self._looked = self._stat(), time.monotonic()

    @property
    def needed(self) -> bool:
        """Whether a key has to be shown at all: never no longer so because a file has become empty."""
        return bool(self._fixed) or self._file is not None

    def find(self, authorization: bytes) -> Key | None:
        """The key of an Authorization header, or None if it is none of ours."""
        self._refresh()
        kind, _, text = authorization.decode("latin-1").partition(" ")
        given = digest(text.strip())
        # All of them, in a time that depends on none.
        matches = [key for key in (*self._fixed, *self._read) if hmac.compare_digest(given, key.digest)]
        return matches[0] if matches and kind.lower() == "bearer" else None

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.stat() if self._file is not None else None
        except OSError:
            return None
        return found and (found.st_mtime_ns, found.st_size, found.st_ino)

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < LOOK_AGAIN_S:
            return
        self._looked = now
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._read = read_keys(self._file)
            LOG.info("keys read again: %d", len(self._read))
        except UserError as error:
            LOG.error("keys not read again, the ones before stay in force: %s", error)


class Spent:
    """What each name has used: requests under way, and requests and tokens of the last minute."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Minute] = {}

    def of(self, key: Key) -> _Minute:
        return self._buckets.setdefault(key.name, _Minute())


class _Minute:
    def __init__(self) -> None:
        self.active = 0
        self._requests: list[float] = []
        self._tokens: list[tuple[float, int]] = []

    def begin(self, key: Key) -> tuple[str, float] | None:
        """Count a request. What is used up and in how many seconds it is not, or None."""
        now = time.monotonic()
        self._requests = [at for at in self._requests if at > now - 60]
        self._tokens = [(at, n) for at, n in self._tokens if at > now - 60]
        if key.active is not None and self.active >= key.active:
            return "requests at a time", 1.0
        if key.requests_per_minute is not None and len(self._requests) >= key.requests_per_minute:
            return "requests a minute", self._requests[0] + 60 - now
        if key.tokens_per_minute is not None and sum(n for _, n in self._tokens) >= key.tokens_per_minute:
            return "tokens a minute", self._tokens[0][0] + 60 - now
        self.active += 1
        if key.requests_per_minute is not None:
            self._requests.append(now)
        return None

    def end(self, key: Key, tokens: int) -> None:
        self.active -= 1
        if key.tokens_per_minute is not None and tokens:
            self._tokens.append((time.monotonic(), tokens))
