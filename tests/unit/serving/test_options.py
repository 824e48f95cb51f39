"""Options of the proxy: flags over the file over the defaults, and files that are shipped."""

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sgt_titan.errors import UserError
from sgt_titan.serving.options import DEFAULTS, parser, read_options

ROOT = Path(__file__).resolve().parents[3]
TWO = """
port = 9000
drop_params = true
[[models]]
name = "a"
export = "x"
  [[models.upstreams]]
  url = "https://one"
  [[models.upstreams]]
  url = "https://two"
  wire_dtype = "bfloat16"
[[models]]
name = "b"
export = "y"
tool_format = "hermes"
  [[models.upstreams]]
  url = "http://three"
  backend = "sglang"
"""


def written(tmp_path, text):
    file = tmp_path / "serve.toml"
    file.write_text(text)
    return str(file)


def test_flags_override_the_file(tmp_path):
    options = read_options(["--config", written(tmp_path, TWO), "--port", "9001"])
    assert options.port == 9001 and options.drop_params and options.host == "127.0.0.1"
    assert [(m.name, m.export, m.tool_format) for m in options.models] == [("a", "x", None), ("b", "y", "hermes")]
    assert [u.url for u in options.models[0].upstreams] == ["https://one", "https://two"]
    assert (
        options.models[0].upstreams[1].wire_dtype == "bfloat16" and options.models[1].upstreams[0].backend == "sglang"
    )


def test_one_model_by_flags(tmp_path):
    options = read_options(["x", "--upstream", "http://a", "--upstream", "http://b", "--served-name", "n"])
    (model,) = options.models
    assert (model.export, model.name) == ("x", "n") and [u.url for u in model.upstreams] == ["http://a", "http://b"]
    by_file = written(tmp_path, 'export = "x"\nupstream = ["http://a", "http://b"]\nserved_name = "n"\n')
    assert read_options(["--config", by_file]).models == options.models


def test_every_flag_has_a_default_and_the_reverse():
    flags = {action.dest for action in parser()._actions} - {"help", "config"}
    assert flags == set(DEFAULTS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("prot = 3", "prot: no such option; known are"),
        ('port = "3"', "port: must be a whole number"),
        ("port = true", "port: must be a whole number"),
        ("port = 65536", "port: must be from 0 to 65535"),
        ("max_tokens = 0", "max_tokens: must be at least 1"),
        ("max_body_mib = nan", "max_body_mib: must be above 0"),
        ('wait_timeout = "30"', "wait_timeout: must be a number"),
        ("drop_params = 1", "drop_params: must be true or false"),
        ('backend = "tgi"', "backend: must be one of"),
        ('upstream = "http://a"', "upstream: must be a list of texts"),
        ("models = 3", r"models: must be one or more tables"),
        ("[[models]]\nexport = 'x'", r"models\[0\]: needs one or more tables"),
        ("[[models]]\n[[models.upstreams]]\nurl = 'http://a'", r"models\[0\]: export is missing"),
        ("[[models]]\nexport = 'x'\n[[models.upstreams]]\nurl = 3", r"upstreams\[0\].url: must be text"),
        ("[[models]]\nexport = 'x'\n[[models.upstreams]]\nulr = 'a'", r"ulr: no such key"),
        ("[[models]]\nexport = 'x'\n[[models.upstreams]]\nurl = 'ftp://a'", "is no URL"),
        (TWO.replace('"b"', '"a"'), "need a name each"),
        ("export = 'x'\n" + TWO, "leave out EXPORT"),
        ("upstream_api_key_file = 'k'\nresults = 'r'\n" + TWO, "leave out --upstream-api-key-file, --results"),
        ("[", "is not valid TOML"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as refused:
        read_options(["--config", written(tmp_path, text)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "EXPORT is missing"),
        (["x"], "--upstream is missing"),
        (["x", "--upstream", "http://a", "--wait-timeout", "-1"], "--wait-timeout must be at least 0"),
        (["x", "--upstream", "http://a", "--retries", "-1"], "--retries"),
        (["x", "--upstream", "http://a", "--allowed-origin", "app"], "--allowed-origin"),
        (["x", "--upstream", "http://a", "--fresh-noise", "--noise-key", "k"], "choose one"),
        (["--config", "missing.toml"], "cannot be read"),
    ],
)
def test_flags_that_are_none(words, message):
    with pytest.raises(UserError, match=message):
        read_options(words)


def test_what_models_say_themselves_is_not_said_beside_them(tmp_path):
    """It would be for none of them, in silence."""
    with pytest.raises(UserError, match=r"has \[\[models\]\].*; leave out --wire-dtype"):
        read_options(["--config", written(tmp_path, TWO), "--wire-dtype", "float16"])


def test_the_example_that_is_shipped(tmp_path):
    options = read_options(["--config", str(ROOT / "examples/serve.toml")])
    assert len(options.models) == 2 and options.noise_key and options.api_key_file


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_unit_starts_what_there_is():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(ROOT / "examples/sgt-titan.service")
    service = unit["Service"]
    program, command, *flags = service["ExecStart"].split()
    assert Path(program).name in project()["scripts"] and command == "serve"
    assert vars(parser().parse_args(flags)) == {"config": "/etc/sgt-titan/serve.toml"}
    assert service["WorkingDirectory"] == f"/var/lib/{service['StateDirectory']}", (
        "where keys and exports are looked for"
    )
    assert int(service["TimeoutStopSec"]) > DEFAULTS["shutdown_timeout"], "answers under way would be cut off"
    for name in ("NoNewPrivileges", "ProtectSystem", "PrivateTmp", "LimitCORE"):
        assert name in service, name


def test_the_container_starts_what_there_is():
    text = (ROOT / "examples/Dockerfile").read_text()
    does = defaultdict(list)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line and not line.startswith("#"):
            does[line.split()[0]].append(line.split(maxsplit=1)[1])
    (python,) = re.findall(r"^python:(\d+\.\d+)", does["FROM"][0])
    assert Version(python) in SpecifierSet(project()["requires-python"])
    for *files, target in map(str.split, does["COPY"]):
        assert target.startswith("/src/") and all((ROOT / file).exists() for file in files), files
    (pip,) = does["RUN"]
    assert "-c /src/constraints.txt" in pip
    (extras,) = re.findall(r"/src\[([a-z,]+)\]", pip)
    assert set(extras.split(",")) <= project()["optional-dependencies"].keys()
    name, command = re.findall(r'"([^"]+)"', does["ENTRYPOINT"][0])
    assert name in project()["scripts"] and command == "serve"
    assert does["USER"][0] != "0" and does["WORKDIR"] == ["/state"]
    # The command that the comment shows.
    shown = re.sub(r"\\\n#", " ", text).partition("docker run ")[2].splitlines()[0]
    flags = shown.partition(" sgt-titan ")[2].split()
    assert vars(parser().parse_args(flags)) == {"config": "/state/serve.toml", "host": "0.0.0.0"}
    port = re.search(r"-p \S+:(\d+) ", shown)[1]
    assert port == does["EXPOSE"][0] == str(DEFAULTS["port"]) and ":/state " in shown


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_reads_the_unit_without_a_complaint(tmp_path):
    unit = tmp_path / "sgt-titan.service"
    text = (ROOT / "examples/sgt-titan.service").read_text()
    for words, complaints in ((sys.executable, False), ("/no/such/program", True)):
        unit.write_text(text.replace("/opt/sgt-titan/bin/sgt-titan", words))
        said = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
        assert bool(said.returncode or said.stderr) == complaints, said.stderr
