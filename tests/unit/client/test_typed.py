"""Text that a model wrote becomes what the tool's schema declares."""

import pytest

from sgt_titan.client.typed import json_of, typed

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "flag": {"type": "boolean"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["integer", "string"]},
        "color": {"enum": ["1", "2"]},
        "level": {"const": 3},
        "list": {"type": "array", "items": {"type": "string"}},
        "object": {"type": "object"},
        "named": {"$ref": "#/$defs/Zip"},
        "wrapped": {"allOf": [{"$ref": "#/$defs/Zip"}]},
        "round": {"$ref": "#/$defs/Round"},
        "elsewhere": {"$ref": "https://example.com/schema"},
        "free": {},
        "odd": 3,
    },
    "$defs": {"Zip": {"type": "string"}, "Round": {"$ref": "#/$defs/Round"}},
}


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("text", "12", "12"),
        ("text", "true", "true"),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("text", "None", "None"),
        ("count", "12", 12),
        ("count", " 12 ", 12),
        ("count", "twelve", "twelve"),
        ("share", "3", 3),
        ("share", "0.5", 0.5),
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", "yes", "yes"),
        ("maybe", "null", None),
        ("maybe", "None", None),
        ("maybe", "7", "7"),
        ("either", "7", 7),
        ("either", "seven", "seven"),
        ("color", "1", "1"),
        ("level", "3", 3),
        ("list", '["a", "1"]', ["a", "1"]),
        ("object", '{"a": [1, null]}', {"a": [1, None]}),
        ("named", "02134", "02134"),
        ("named", "12345", "12345"),
        ("wrapped", "12345", "12345"),
        ("round", "12345", 12345),
        ("elsewhere", "12345", 12345),
        ("free", "12345", 12345),
        ("free", "NaN", "NaN"),
        ("odd", "[1]", [1]),
        ("unknown", "null", None),
        ("unknown", "Köln", "Köln"),
    ],
)
def test_typed(name, text, value):
    found = typed(text, SCHEMA, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("schema", [None, {}, {"properties": 3}, [], "x"])
def test_without_a_schema_json_is_json(schema):
    assert typed("12", schema, "a") == 12 and typed("twelve", schema, "a") == "twelve"


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "[", "[" * 100_000, '{"a": NaN}'])
def test_what_json_has_no_word_for(text):
    with pytest.raises(ValueError):
        json_of(text)


def test_no_schema_keeps_it_busy():
    """It is a client's: one that is ten of itself, and one that is long."""
    again = {"$ref": "#/properties/a"}
    assert typed("1", {"properties": {"a": {"anyOf": [again] * 10, "allOf": [again] * 10}}}, "a") == 1
    deep: dict = {"type": "string"}
    for _ in range(20_000):
        deep = {"anyOf": [deep]}
    assert typed("1", {"properties": {"a": deep}}, "a") == 1
    assert typed("1", {"properties": {"a": {"$ref": "#" + "/a" * 20_000}}}, "a") == 1
