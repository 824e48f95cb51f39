import hashlib
import logging

import pytest

from sgt_titan.errors import UserError
from sgt_titan.serving import keys
from sgt_titan.serving.keys import Key, KeyRing, Spent, digest, read_keys

KEY, OTHER = "key-Blatherskite-0123", "key-Blatherskite-4567"


def bearer(key):
    return f"Bearer {key}".encode()


def test_named_keys_with_limits(tmp_path):
    file = tmp_path / "keys.toml"
    sha = hashlib.sha256(OTHER.encode()).hexdigest()
    file.write_text(f'[keys.a]\nkey = "{KEY}"\nactive = 2\n[keys.b]\nsha256 = "{sha}"\nmodels = ["m"]\n')
    ring = KeyRing(file=file)
    assert ring.needed and ring.find(bearer(KEY)) == Key("a", digest(KEY), active=2)
    assert ring.find(bearer(OTHER)).models == ("m",)
    for wrong in (b"", KEY.encode(), b"Basic " + KEY.encode(), bearer(KEY + "x")):
        assert ring.find(wrong) is None
    assert "Blatherskite" not in repr(ring.find(bearer(KEY)))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must hold tables"),
        ("[keys]", "must hold tables"),
        ("x = 1\n[keys.a]\nkey = 'K'", "must hold tables"),
        ("[keys.a]\nkey = 'short'", "at least 16"),
        ("[keys.a]\n", "give either key or sha256"),
        ("[keys.a]\nkey = 'K'\nsha256 = 'K'", "give either key or sha256"),
        ("[keys.a]\nsha256 = 'K'", "64 hexadecimal"),
        ("[keys.a]\nkey = 'K'\nactive = 0", "keys.a.active"),
        ("[keys.a]\nkey = 'K'\nactive = true", "keys.a.active"),
        ("[keys.a]\nkey = 'K'\nlimit = 3", "1 unknown fields"),
        ("[keys.a]\nkey = 'K'\nmodels = 'm'", "keys.a.models"),
        ("[keys.'a b']\nkey = 'K'", "a name in keys"),
        ("[keys.a]\nkey = 'K'\n[keys.b]\nkey = 'K'", "the same key"),
        ("[keys.a\nkey = 'K'", "not valid TOML"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    file = tmp_path / "keys.toml"
    file.write_text(text.replace("K", KEY))
    with pytest.raises(UserError, match=message) as refused:
        read_keys(file)
    assert "Blatherskite" not in str(refused.value)


def test_they_are_read_again_and_a_bad_file_changes_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(keys, "LOOK_AGAIN_S", 0.0)
    file = tmp_path / "keys"
    file.write_text(KEY + "\n")
    ring = KeyRing(file=file)
    file.write_text(f"{OTHER}\n{KEY}\n")
    assert ring.find(bearer(OTHER)) and ring.find(bearer(KEY))
    caplog.set_level(logging.INFO)
    file.write_text("Blatherskite")
    assert ring.find(bearer(OTHER)) and "stay in force" in caplog.text
    file.unlink()
    assert ring.find(bearer(KEY)) and ring.needed
    assert "Blatherskite" not in caplog.text


def test_what_is_spent(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: now[0])
    spent, key = Spent(), Key("a", b"", active=1, requests_per_minute=2, tokens_per_minute=100)
    minute = spent.of(key)
    assert minute.begin(key) is None
    assert minute.begin(key) == ("requests at a time", 1.0)
    minute.end(key, 60)
    now[0] = 10.0
    assert minute.begin(key) is None
    minute.end(key, 60)
    assert minute.begin(key) == ("requests a minute", 50.0)
    now[0] = 61.0  # the first request is over a minute ago, and so are its tokens
    assert minute.begin(key) is None
    minute.end(key, 60)
    now[0] = 71.0
    assert minute.begin(key) is None
    minute.end(key, 0)
    assert spent.of(Key("b", b"")).begin(Key("b", b"")) is None
