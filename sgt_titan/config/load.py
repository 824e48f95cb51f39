"""YAML files and command line overrides to a ``schema.Config``, and back. No torch.

A file holds values of the schema and nothing else, so every mistake is found by comparing it with the
schema: an unknown key, a wrong type, a choice that is not offered. Internally a file is a flat dict from
dotted key (``objective.mi.weight``) to value; inheritance and overrides are updates of that dict.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from sgt_titan.config.keys import Leaf, choices, describe, get, inner, is_optional, keys, sections, takes_items
from sgt_titan.config.schema import SOURCE_KEYS, Config, Source
from sgt_titan.errors import UserError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


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
    if (own := Path(name_or_path, "config.yaml")).is_file():  # a run's directory: its own config
        return own
    configs = available()
    name = name_or_path.removesuffix(".yaml").removeprefix("train_configs/")
    if name in configs:
        return configs[name]
    if os.sep in name:
        raise UserError(f"no such file: {name_or_path}")
    hint = _nearest(name, configs)
    raise UserError(f"no config or file named {name_or_path}{hint}; available: {', '.join(configs)}")


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Flat values from command line words; see ``load``.

    Raises:
        UserError: a word that is no option, an unknown key, a missing or wrong value.
    """
    values: dict[str, Any] = {}
    for word, text in split_overrides(words):
        key, leaf, item = _override_key(word)
        if text is None:
            if leaf.hint is not bool:
                raise UserError(f"--{word} needs a value: {describe(leaf.hint)}")
            text = "true"
        where = f"--{word}"
        if Source in (leaf.hint, *get_args(leaf.hint)):
            table: Any = text
            for name in reversed(item.split(".") if item else []):
                table = {name: table}
            values[key] = _join(values.get(key, {}), _source_words(table, leaf.hint, f"--{key}"))
        elif item:
            free = get_args(leaf.hint)[1] is Any
            values[key] = {**values.get(key, {}), item: _scalar(text, where) if free else text}
        else:
            values[key] = _convert(_from_text(text, leaf.hint), leaf.hint, where)
    return values


def split_overrides(words: list[str]) -> list[tuple[str, str | None]]:
    """Pairs (key without dashes, text or None) of ``--key value``, ``--key=value`` and bare ``--key``."""
    pairs: list[tuple[str, str | None]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"unexpected argument {word!r}; options are given as --section.key value")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if equals:
            pairs.append((key, text))
        elif rest and takes_value(word, rest[0]):
            pairs.append((key, rest.pop(0)))
        else:
            pairs.append((key, None))
    return pairs


def takes_value(word: str, following: str) -> bool:
    """Whether the option ``--section.key`` takes the next word as its value.

    A boolean takes it only if it is true or false, so that ``--metrics.wandb NAME`` leaves NAME.
    """
    leaf = keys().get(word[2:].replace("-", "_"))
    return (
        "=" not in word
        and not following.startswith("--")
        and (leaf is None or leaf.hint is not bool or _is_bool(following))
    )


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
        raise UserError(f"{_shown(path)}: extends must be a file name, got {_repr.repr(base)}")
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
        raise UserError(f"{shown}: must hold sections with keys, got {_repr.repr(document)}")
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
            below = {key: _convert(value, keys()[key].hint, where)}
        elif key not in sections():
            raise UserError(f"{_shown(path)}: unknown {'key' if prefix else 'section'} {key}{_nearest_key(key)}")
        elif isinstance(value, dict):
            below = _flatten(value, path, key + ".")
        elif value is not None:  # a section whose keys are all commented out reads as null
            raise UserError(f"{where} is a section with keys below it, got {_repr.repr(value)}")
        if twice := next(iter(values.keys() & below.keys()), None):  # as section.key and below its section
            raise UserError(f"{_shown(path)}: {twice} is given twice")
        values |= below
    architecture = values.get("trunk.architecture")
    if architecture and not architecture.startswith(("$", "~")):
        values["trunk.architecture"] = os.path.normpath(path.absolute().parent / architecture)
    return values


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    joined = {key: _join(base.get(key, {}), value) for key, value in top.items() if isinstance(value, dict)}
    return {**base, **top, **joined}


def _join(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings and the tables in them, item by item."""
    deep = {k: _join(base[k], v) for k, v in top.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **top, **deep}


def _build(values: dict[str, Any]) -> Config:
    config = Config()
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        setattr(get(config, section), name, value)
    return config


def _override_key(word: str) -> tuple[str, Leaf, str]:
    """(key, its leaf, item of a mapping or "") of an option's name."""
    if word in sections():
        raise UserError(f"--{word} is a section; give one of its keys, such as --{_first_key(word)}")
    if word in keys() and get_origin(keys()[word].hint) is not dict:
        return word, keys()[word], ""
    if word in keys():
        raise UserError(f"--{word} needs a field: --{word}.{_item_hint(word)}")
    key = next((key for key in keys() if word.startswith(key + ".") and takes_items(keys()[key].hint)), "")
    item = word.removeprefix(key + ".")
    if key and ("." not in item or Source in get_args(keys()[key].hint) or item.startswith("columns.")):
        return key, keys()[key], item
    raise UserError(f"unknown option --{word}{_nearest_key(word, dashes='--')}")


def _source_words(value: Any, hint: Any, where: str) -> Any:
    """A table of sources from words: the values of one are those that its keys take."""
    if hint is not Source:  # by name
        return {name: _source_words(table, Source, f"{where}.{name}") for name, table in value.items()}
    if isinstance(value, dict):
        hints = _source_hints()
        value = {k: _from_text(v, hints[k]) if k in hints and isinstance(v, str) else v for k, v in value.items()}
    return _convert(value, hint, where)


def _source_hints() -> dict[str, Any]:
    return {name: keys()[f"data.{name}"].hint for name in SOURCE_KEYS} | {"weight": float}


def _item_hint(key: str) -> str:
    if Source in get_args(keys()[key].hint):
        return "NAME.source FILE"
    return "NAME VALUE" if get_args(keys()[key].hint)[1] is Any else "text COLUMN"


def _first_key(section: str) -> str:
    return next(key for key in keys() if key.startswith(section + "."))


def _from_text(text: str, hint: Any) -> Any:
    """The value a word on the command line stands for; the word itself if it is none of that type."""
    if is_optional(hint):
        return None if text.lower() in ("none", "null") else _from_text(text, inner(hint))
    if hint is bool and _is_bool(text):
        return text.lower() == "true"
    if hint is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    return text


def _is_bool(text: str) -> bool:
    return text.lower() in ("true", "false")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the schema's type, strictly: no rounding, no truth values of other things.

    Raises:
        UserError: it is of another type or not among the choices.
    """
    wrong = UserError(f"{where} must be {describe(hint)}, got {_repr.repr(value)}")
    if is_optional(hint):
        if value is None:
            return None
        try:
            return _convert(value, inner(hint), where)
        except UserError:
            raise wrong from None
    if offered := choices(hint):
        if value not in offered:
            raise UserError(f"{wrong}{_nearest(value, offered)}" if isinstance(value, str) else str(wrong))
        return value
    if hint is Source:
        return _source(value, where, wrong)
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise wrong
        if Source in get_args(hint):
            return {str(name): _convert(table, Source, f"{where}.{name}") for name, table in value.items()}
        if get_args(hint)[1] is Any:
            _refuse_odd(value, where)
            return copy.deepcopy(value)
        for name, item in value.items():
            if not (isinstance(name, str) and isinstance(item, str)):
                raise UserError(f"{where}.{name} must be a string, got {_repr.repr(item)}")
        return dict(value)
    if where.endswith(".source") and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return "\n".join(value)
    if hint is float:
        # YAML 1.1 reads 1e-3 (no dot) as a string.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number and not (isinstance(value, str) and _NUMBER.fullmatch(value)):
            raise wrong
        try:
            value = float(value)
        except OverflowError:  # an integer of more than 308 digits
            raise wrong from None
        if not math.isfinite(value):
            raise wrong
        return value
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong
    return value


def _source(value: Any, where: str, wrong: UserError) -> dict[str, Any]:
    """A table of `data.sources`; a text or a list of texts is its source."""
    if isinstance(value, str | list):
        value = {"source": value} if value else {}
    if not isinstance(value, dict):
        raise wrong
    hints, found = _source_hints(), {}
    for name, item in value.items():
        if name not in hints:
            raise UserError(f"{where}: unknown key {_repr.repr(name)}{_nearest(str(name), hints)}")
        if item is not None:
            found[name] = _convert(item, hints[name], f"{where}.{name}")
    return found


def _scalar(text: str, where: str) -> Any:
    """What a word stands for in YAML: false, 3, text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{where}: invalid YAML: {_repr.repr(text)}") from None


def _refuse_odd(value: Any, where: str) -> None:
    """Raise UserError unless a value is what JSON can hold."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise UserError(f"{where}: {_repr.repr(name)} must be a name")
            _refuse_odd(item, f"{where}.{name}")
    elif isinstance(value, list):
        for item in value:
            _refuse_odd(item, where)
    elif not isinstance(value, str | int | float | bool | None) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise UserError(f"{where} must be text, a number, true or false, got {_repr.repr(value)}")


def _nearest(word: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_key(key: str, dashes: str = "") -> str:
    """A suggestion: the same name in another section first, then the most similar key."""
    candidates = [*keys(), *sections()]
    name = key.rpartition(".")[2]
    same = [candidate for candidate in keys() if candidate.rpartition(".")[2] == name]
    close = difflib.get_close_matches(key, same, n=1, cutoff=0.0) or difflib.get_close_matches(key, candidates, n=1)
    if not close:  # training_steps, sed: compare the last parts alone
        names = {candidate.rpartition(".")[2]: candidate for candidate in reversed(keys())}
        close = [names[match] for match in difflib.get_close_matches(name, names, n=1, cutoff=0.7)]
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _show(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=4096).removesuffix("\n").removesuffix("\n...")


def _shown(path: Path) -> str:
    """The path as a user would type it: relative where it lies below the working directory."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)
