"""A key reaches the servers it is for, and no other provider's."""

import pytest

from sgt_titan import cli
from sgt_titan.errors import UserError
from sgt_titan.serving.credentials import VARIABLE, upstream_keys
from sgt_titan.serving.options import UpstreamOptions, read_options

SECRET, OTHER = "sk-of-the-environment", "sk-of-a-file"
ONE, TWO = "https://api.one.example", "https://api.two.example"


@pytest.fixture
def key_file(tmp_path):
    file = tmp_path / "upstream.key"
    file.write_text(f"{OTHER}\n")
    return str(file)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, SECRET)


def keys(*upstreams):
    return list(upstream_keys(upstreams).values())


@pytest.mark.parametrize(
    "urls",
    [
        [ONE],
        [ONE, f"{ONE}:443/v1"],  # written otherwise, the same origin
        ["HTTPS://API.one.example", f"{ONE}/models"],
        ["http://[::1]:8000", "http://[::1]:8000/v1"],
    ],
)
def test_one_origin_gets_the_environment_s(urls):
    assert set(keys(*map(UpstreamOptions, urls))) == {SECRET}


@pytest.mark.parametrize("other", [TWO, "http://api.one.example", f"{ONE}:8443", "https://one.example"])
def test_several_origins_have_to_say(other, key_file):
    for second in (UpstreamOptions(other), UpstreamOptions(other, api_key_file=key_file)):
        with pytest.raises(UserError, match=f"{VARIABLE}: is set, and could be for http.* or http.*: say which") as no:
            keys(UpstreamOptions(ONE), second)
        assert SECRET not in str(no.value) and OTHER not in str(no.value) and "\n" not in str(no.value)


def test_whoever_is_named_gets_it_and_nobody_else(key_file, monkeypatch):
    named, silent, own = (
        UpstreamOptions(ONE, api_key_env=VARIABLE),
        UpstreamOptions(TWO),
        UpstreamOptions(TWO, api_key_file=key_file),
    )
    assert keys(named, silent, own) == [SECRET, None, OTHER]
    monkeypatch.setenv("KEY_OF_TWO", "sk-2")
    assert keys(named, UpstreamOptions(TWO, api_key_env="KEY_OF_TWO")) == [SECRET, "sk-2"]
    assert keys(own, UpstreamOptions(ONE, api_key_file=key_file)) == [OTHER, OTHER]  # all have said it


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_no_key_is_none(value, monkeypatch):
    monkeypatch.delenv(VARIABLE) if value is None else monkeypatch.setenv(VARIABLE, value)
    assert keys(UpstreamOptions(ONE), UpstreamOptions(TWO)) == [None, None]


@pytest.mark.parametrize(
    "value, message", [("a b", "holds 2 keys"), ("a\nb", "holds 2 keys"), ("schl\u00fcssel", "is not ASCII")]
)
def test_a_key_that_is_none(value, message, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UserError, match=f"{VARIABLE}: .*{message}") as refused:
        keys(UpstreamOptions(ONE))
    assert value not in str(refused.value)
    (tmp_path / "key").write_text(value)
    with pytest.raises(UserError, match=message):
        keys(UpstreamOptions(ONE, api_key_file=str(tmp_path / "key")))
    (tmp_path / "key").write_text(OTHER)
    assert keys(UpstreamOptions(ONE, api_key_file=str(tmp_path / "key"))) == [OTHER], "who needs it not is not asked"


@pytest.mark.parametrize(
    "more, message",
    [
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "api_key_env: NOT_SET_ANYWHERE: holds 0 keys"),
        ({"api_key_file": "/nowhere"}, "/nowhere: cannot be read"),
        ({"api_key_file": "/nowhere", "api_key_env": VARIABLE}, "give one of them"),
    ],
)
def test_what_is_said_has_to_be_there(more, message):
    with pytest.raises(UserError, match=message):
        keys(UpstreamOptions(ONE, **more))


def test_a_file_of_flags_is_for_all_of_them(key_file):
    words = ["x", "--upstream", ONE, "--upstream", TWO]
    (model,) = read_options([*words, "--upstream-api-key-file", key_file]).models
    assert keys(*model.upstreams) == [OTHER, OTHER]
    with pytest.raises(UserError, match="--upstream-api-key-file is for all of --upstream"):
        keys(*read_options(words).models[0].upstreams)


def test_the_command_refuses_before_anything_is_loaded(tmp_path, capsys):
    """Two models of two providers, as a config that says nothing of keys has them."""
    model = "[[models]]\nname = '{0}'\nexport = '/nowhere'\n[[models.upstreams]]\nurl = '{0}'\n"
    (tmp_path / "serve.toml").write_text(model.format(ONE) + model.format(TWO))
    assert cli.main(["serve", "--config", str(tmp_path / "serve.toml"), "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert VARIABLE in said and said.count("\n") == 1 and SECRET not in said
