"""Rows as people have them, and what becomes of each."""

from __future__ import annotations

import datetime
import json

import pytest

from sgt_titan.data.conversations import Written, conversation
from sgt_titan.errors import UserError

COLUMNS = {
    k: k for k in ("text", "system", "instruction", "input", "output", "history", "messages", "tools", "private")
}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def turns(row, fmt, **columns):
    found = conversation(row, fmt, COLUMNS | columns)
    return [(m["role"], m["content"]) for m in found.messages]


@pytest.mark.parametrize(
    ("row", "fmt", "expected"),
    [
        ({"text": "a"}, "text", [("user", "a")]),
        ({"text": None}, "text", [("user", "")]),
        ({"instruction": "a", "output": "b"}, "instruction", [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "output": Written("1.50")}, "instruction", [("user", "a"), ("assistant", "1.50")]),
        ({"instruction": 7, "output": True}, "instruction", [("user", "7"), ("assistant", "true")]),
        ({"instruction": "a", "output": datetime.date(2024, 1, 2)}, "instruction",
         [("user", "a"), ("assistant", "2024-01-02")]),
        ({"instruction": "a", "input": "c", "output": 3}, "instruction", [("user", "a\n\nc"), ("assistant", "3")]),
        ({"system": "s", "instruction": "a", "input": " ", "output": "b"}, "instruction",
         [("system", "s"), ("user", "a"), ("assistant", "b")]),
        ({"system": None, "instruction": "a", "input": None, "output": "b"}, "instruction",
         [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "output": " "}, "instruction", [("user", "a")]),
        ({"instruction": "a"}, "instruction", [("user", "a")]),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}, "instruction",
         [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]),
        ({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}, "chat",
         [("system", "s"), ("user", "a"), ("assistant", "b")]),
        ({"messages": [{"role": "developer", "content": "s"}, {"role": "USER", "content": "a"}]}, "chat",
         [("system", "s"), ("user", "a")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]}, "chat",
         [("user", "ab")]),
        ({"messages": json.dumps([{"role": "user", "content": "a"}])}, "chat", [("user", "a")]),
        ({"messages": [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                       {"from": "observation", "value": "3"}]}, "chat", [("assistant", ""), ("tool", "3")]),
    ],
)  # fmt: skip
def test_turns(row, fmt, expected):
    assert turns(row, fmt) == expected


def test_names_of_one_s_own():
    row = {"talk": [{"who": "Kunde", "said": "a"}, {"who": "agent", "said": "b"}]}
    columns = {"messages": "talk", "role": "who", "content": "said"}
    found = conversation(row, "chat", columns, {"Kunde": "user", "agent": "assistant"})
    assert [(m["role"], m["content"]) for m in found.messages] == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("arguments", [{"x": 1, "y": None}, '{"x": 1}'])
def test_calls_tools_and_thoughts(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm", "weight": 0},
            {"role": "tool", "content": "3", "tool_call_id": "c", "name": "f"},
            {"role": "assistant", "content": "b", "refusal": None, "score": 3},
        ],
        "tools": json.dumps([{"name": "f"}]),
    }
    found = conversation(row, "chat", COLUMNS)
    assert found.tools == [{"name": "f"}] and found.ignored == ("key score of turns",)
    assert found.messages[2] == {"role": "tool", "content": "3", "tool_call_id": "c", "name": "f"}
    expected = {"role": "assistant", "content": "", "reasoning_content": "hm", "weight": 0}
    assert found.messages[1] == {**expected, "tool_calls": [{**CALL, "id": "c"}]}
    old = {"messages": [{"role": "assistant", "function_call": CALL["function"]}]}
    assert conversation(old, "chat", COLUMNS).messages[0]["tool_calls"] == [CALL]


def test_which_answers():
    said = [("user", 1), ("assistant", 1), ("user", 1), ("assistant", 0), ("user", 1), ("assistant", 1), ("user", 1)]
    row = {"messages": [{"role": role, "content": "x", "weight": weight} for role, weight in said]}
    found = conversation(row, "chat", COLUMNS)
    assert found.ends("last") == ([6], ("turns after the last answer",))
    assert found.ends("all") == ([2, 6], ("turns after the last answer",))
    assert conversation({"messages": row["messages"][:1]}, "chat", COLUMNS).ends("all") == ([1], ())
    with pytest.raises(UserError, match="every answer has weight 0"):
        conversation({"messages": row["messages"][2:4]}, "chat", COLUMNS).ends("last")


def test_a_first_turn_answers_nothing():
    """As many of ShareGPT begin: part of the prompt of what follows, and no sample of its own."""
    turns = [{"from": who, "value": str(i)} for i, who in enumerate(("gpt", "human", "gpt"))]
    found = conversation({"messages": turns}, "chat", COLUMNS)
    assert found.ends("all") == ([3], ("a first turn that answers nothing, as an answer",)) and found.ends("last") == (
        [3],
        (),
    )


def test_a_weight_where_there_is_no_answer_is_named():
    turns = [{"role": role, "content": "x", "weight": weight} for role, weight in (("user", 0.5), ("assistant", 1))]
    assert conversation({"messages": turns}, "chat", COLUMNS).ignored == ("weight of turns that are no answers",)
    turns[0]["weight"] = 0  # which it has anyway
    assert conversation({"messages": turns}, "chat", COLUMNS).ignored == ()


def turn(**keys):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | keys]}


@pytest.mark.parametrize(
    ("row", "ignored"),
    [
        (turn(value="c"), ["key value of turns"]),
        (turn(speaker="Ann"), ["key speaker of turns"]),
        (turn(reasoning="c", thinking="d"), ["key thinking of turns"]),
        (turn(function_call={"name": "f"}, tool_calls=[CALL]), ["key function_call of turns"]),
        (turn(role="user", reasoning="c", tool_calls=[CALL]), ["key reasoning of turns", "key tool_calls of turns"]),
        (turn(role="user", name="Ann", weight=1), ["key name of turns"]),
        (turn(content=[{"type": "text", "text": "b", "cache_control": {"type": "x"}, "annotations": []}]),
         ["key cache_control of parts"]),
        (turn(tool_calls=[{"index": 0, "id": 7, "type": "function", "function": {"name": "f", "description": "d"}}]),
         ["key description of calls", "key index of calls", "key id of calls"]),
        (turn(tool_calls=[{"name": "f", "arguments": {"x": 1}, "parameters": {"x": 2}}]), ["key parameters of calls"]),
        (turn(role="function_call", content='{"name": "f"}', tool_calls=[CALL]), ["key tool_calls of turns"]),
        (turn(**{"x" * 50: 1}), [f"key {'x' * 40} of turns"]),
        (turn(name=None, refusal="", audio={}), []),
    ],
)  # fmt: skip
def test_what_of_a_turn_is_not_used_is_named(row, ignored):
    assert list(conversation(row, "chat", COLUMNS).ignored) == ignored


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_parts_of_text(kind):
    parts = [{"type": kind, "text": "a"}, {"type": kind, "text": None}, {"type": kind, "text": "b"}]
    assert turns({"messages": [{"role": "user", "content": parts}]}, "chat") == [("user", "ab")]


def test_a_null_is_an_empty_text_where_there_is_a_key_for_it():
    row = {"messages": [{"role": "user", "content": None, "value": "a"}, {"role": "assistant", "content": None}]}
    assert turns(row, "chat") == [("user", "a"), ("assistant", "")]


def test_answers_that_say_nothing_are_none():
    said = [("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", None)]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    found = conversation(row, "chat", COLUMNS)
    note = "answers that say nothing"
    assert found.ends("last") == ([4], (note, "turns after the last answer")) and found.ends("all")[0] == [4]
    assert conversation({"messages": row["messages"][:2]}, "chat", COLUMNS).ends("last") == ([1], (note,))
    with pytest.raises(UserError, match="has nothing but empty answers"):
        conversation({"messages": row["messages"][1:2]}, "chat", COLUMNS).ends("last")
    call = {"messages": [*row["messages"][:1], {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    assert conversation(call, "chat", COLUMNS).ends("last") == ([2], ())


def test_history_as_a_table_holds_it():
    row = {"instruction": "c", "output": "d", "history": '[["a", "b"]]'}
    assert turns(row, "instruction")[:2] == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (turn(content=[{"type": "text", "text": {"value": "b", "annotations": []}}]),
         "turn 1 of 'messages' has a text part whose text is none"),
        (turn(content=[{"type": "text", "content": "b"}]), "turn 1 of 'messages' has a text part whose text is none"),
        (turn(content=[{"type": ["text"], "text": "b"}]), "turn 1 of 'messages' has a part that is no text (['text'])"),
        (turn(content=["b"]), "turn 1 of 'messages' has a part that is no text (str)"),
        (turn(content={"parts": ["b"]}), "turn 1 of 'messages': must be text"),
        (turn(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),
         "turn 1 of 'messages': arguments of a call must be an object"),
        (turn(tool_calls={"function": {"name": "f"}}), "turn 1 of 'messages': tool_calls must be a list"),
        (turn(tool_calls=["f"]), "turn 1 of 'messages': a tool call must have a name"),
        (turn(role=0), "turn 1 of 'messages' has no 'role'"),
        ({"messages": {"role": ["user"], "content": ["a"]}},
         "'messages' must be a list of {role, content}, is dict"),
        ({"messages": "hi"}, "'messages' must be a list of {role, content}, is str"),
        ({"messages": "[hi"}, "'messages' is not valid JSON"),
        ({"messages": []}, "'messages' has no turns"),
        ({"messages": [{"role": "user"}]}, "turn 0 of 'messages' has no 'content'"),
        ({"messages": [{"content": "a"}]}, "turn 0 of 'messages' has no 'role'"),
        ({"messages": ["a"]}, "turn 0 of 'messages' has no 'role'"),
        ({"messages": [{"role": "narrator", "content": "a"}]},
         "turn 0 of 'messages' has the role 'narrator'; map it with data.roles"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "turn 0 of 'messages' has a part that is no text (image_url)"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
         "turn 0 of 'messages': weight 0.5 is neither zero nor one; fractions are not trained with"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": "1"}]},
         "turn 0 of 'messages': weight '1' is neither zero nor one; fractions are not trained with"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
         "turn 0 of 'messages': a tool call must have a name"),
        ({"messages": [{"from": "function_call", "value": "f()"}]}, "turn 0 of 'messages' is not valid JSON"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "f"}, "'tools' (field 'tools') is not valid JSON"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(row, message):
    with pytest.raises(UserError) as error:
        conversation(row, "chat", COLUMNS)
    assert str(error.value) == message
