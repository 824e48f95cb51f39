"""YAML files and command line overrides to a ``schema.Config``, and back. No torch.

A file holds values of the schema and nothing else, so every mistake is found by comparing it with the
schema: an unknown key, a wrong type, a choice that is not offered. Internally a file is a flat dict from
dotted key (``objective.mi.weight``) to value; inheritance and overrides are updates of that dict.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from sgt_titan.config.keys import get, keys, sections
from sgt_titan.config.overrides import join, nearest_key, parse_overrides
from sgt_titan.config.schema import Config
from sgt_titan.config.values import brief, convert, nearest
from sgt_titan.errors import UserError

RECORDED = "config.yaml"  # in a run's directory


def load(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """Read a run configuration: a file, then the file it extends underneath, then overrides on top.

    Args:
        name_or_path: a file, or the name of one in ``train_configs`` (see ``find``).
        overrides: command line words, ``--section.key value``, ``--section.key=value`` or a bare
            ``--section.key`` for a boolean.

    Raises:
        UserError: no such config, invalid YAML, unknown or repeated key, wrong type or choice.
    """
    return _build(_merge(_read(find(name_or_path)), parse_overrides(list(overrides))))


def recorded(folder: str | Path) -> Config | None:
    """The config that a run left in its directory; None where there is none. Raises UserError if it is damaged."""
    file = Path(folder, RECORDED)
    return load(str(file)) if file.is_file() else None


def override(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of a config with overrides on top. Raises UserError as ``load``."""
    values = {key: copy.deepcopy(get(config, key)) for key in keys()}
    return _build(_merge(values, parse_overrides(list(overrides))))


def available() -> dict[str, Path]:
    """Names of the configs in ``train_configs`` of the working directory and of the package (a link in a checkout).

    A name in both means the one in the working directory.
    """
    shipped = (Path(__file__).parents[1] / "train_configs").resolve()
    found: dict[str, Path] = {}
    for folder in (shipped, Path("train_configs")):
        found.update({path.stem: path for path in folder.glob("*.yaml")})
    return dict(sorted(found.items()))


def find(name_or_path: str) -> Path:
    """The file that a name or path on the command line means.

    Raises:
        UserError: neither a file nor a name; lists the names and the nearest one.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    if (own := Path(name_or_path, RECORDED)).is_file():  # a run's directory: its own config
        return own
    configs = available()
    name = name_or_path.removesuffix(".yaml").removeprefix("train_configs/")
    if name in configs:
        return configs[name]
    if os.sep in name:
        raise UserError(f"no such file: {name_or_path}")
    hint = nearest(name, configs)
    raise UserError(f"no config or file named {name_or_path}{hint}; available: {', '.join(configs)}")


def as_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts, for YAML and for loggers."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """The config as YAML with every value; ``load`` of it gives an equal config."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=4096)


HOW_IT_RUNS = (
    "run.name",
    "run.output_dir",
    "run.deterministic",
    "cluster.",
    "trunk.path",
    "trunk.read",
    "data.cache_dir",
    "parallelism.",
    "activation_checkpoint.",
    "compile.",
    "checkpoint.",
    "metrics.",
    "comm.",
    "export.",
)
"""Sections and keys that say where and on what a run works and what is shown of it, not what is learned."""


def difference(a: Config, b: Config) -> list[str]:
    """The keys whose values differ, as ``training.steps: 100 -> 200``, in the schema's order."""
    pairs = ((key, get(a, key), get(b, key)) for key in keys())
    return [f"{key}: {_show(old)} -> {_show(new)}" for key, old, new in pairs if old != new]


def _read(path: Path) -> dict[str, Any]:
    """Flat values of a file on top of those of the file it extends."""
    document = _parse(path)
    base = document.pop("extends", None)
    values = _flatten(document, path)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{_shown(path)}: extends must be a file name, got {brief(base)}")
    base_path = path.parent / base
    if not base_path.is_file():
        raise UserError(f"{_shown(path)}: extends {base}, but there is no file {_shown(base_path)}")
    base_document = _parse(base_path)
    if "extends" in base_document:
        raise UserError(
            f"{_shown(path)}: extends {base}, which itself extends {base_document['extends']}; one level only"
        )
    return _merge(_flatten(base_document, base_path), values)


def _parse(path: Path) -> dict[str, Any]:
    shown = _shown(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _refuse_duplicates(node, shown)
        document = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown}: is not a UTF-8 text file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{shown}{place}: invalid YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{shown}: invalid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{shown}: invalid YAML: {' '.join(str(error).split())}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(f"{shown}: must hold sections with keys, got {brief(document)}")
    return document


def _refuse_duplicates(root: yaml.Node, shown: str) -> None:
    """PyYAML silently keeps the last of two equal keys, which hides a merge gone wrong."""
    seen: set[int] = set()
    stack: list[tuple[yaml.Node, str]] = [(root, "")]
    while stack:
        node, prefix = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            stack.extend((child, prefix) for child in node.value)
        if not isinstance(node, yaml.MappingNode):
            continue
        names: set[str] = set()
        for name, child in node.value:
            key = prefix + str(name.value)
            if isinstance(name, yaml.ScalarNode) and name.value in names:
                raise UserError(f"{shown} line {name.start_mark.line + 1}: {key} is given twice")
            if isinstance(name, yaml.ScalarNode):
                names.add(name.value)
            stack.append((child, key + "."))


def _flatten(node: dict[Any, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        where = f"{_shown(path)}: {key}"
        below: dict[str, Any] = {}
        if key in keys():
            below = {key: convert(value, keys()[key].hint, where)}
        elif key not in sections():
            raise UserError(f"{_shown(path)}: unknown {'key' if prefix else 'section'} {key}{nearest_key(key)}")
        elif isinstance(value, dict):
            below = _flatten(value, path, key + ".")
        elif value is not None:  # a section whose keys are all commented out reads as null
            raise UserError(f"{where} is a section with keys below it, got {brief(value)}")
        if twice := next(iter(values.keys() & below.keys()), None):  # as section.key and below its section
            raise UserError(f"{_shown(path)}: {twice} is given twice")
        values |= below
    architecture = values.get("trunk.architecture")
    if architecture and not architecture.startswith(("$", "~")):
        values["trunk.architecture"] = os.path.normpath(path.absolute().parent / architecture)
    return values


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    joined = {key: join(base.get(key, {}), value) for key, value in top.items() if isinstance(value, dict)}
    return {**base, **top, **joined}


def _build(values: dict[str, Any]) -> Config:
    config = Config()
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        setattr(get(config, section), name, value)
    return config


def _show(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=4096).removesuffix("\n").removesuffix("\n...")


def _shown(path: Path) -> str:
    """The path as a user would type it: relative where it lies below the working directory."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)
