"""JSON, schemas and forced calls, kept on this side through OpenAI's own client."""

import json

import httpx
import openai
import pytest
from pydantic import BaseModel

from sgt_titan.client.answer import Delta
from sgt_titan.errors import UserError
from sgt_titan.private import Private
from sgt_titan.serving import promise
from sgt_titan.serving.app import create_app
from sgt_titan.serving.promise import Promise, bare, told
from sgt_titan.serving.settings import Settings
from tests.stub_servers import Scripted, running

CANARY = "Zorblax-7741"
ASK = {"model": "m", "messages": [{"role": "user", "content": "who?"}]}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["age"]}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


def form(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}}


@pytest.fixture(scope="module")
def model():
    return Scripted()


@pytest.fixture(scope="module")
def app(agent_sgt, model):
    with running(create_app(Settings("http://u"), agent_sgt, httpx.MockTransport(model))) as url:
        yield url


@pytest.fixture
def chat(app, model):
    model.asked.clear()
    with openai.OpenAI(base_url=app + "/v1", api_key="unused", max_retries=0) as client:
        yield client.chat.completions


def sent(model, number=-1):
    return model.asked[number]["prompt_embeds"]


def test_a_schema_is_told_checked_and_asked_for_again(chat, model, agent_sgt):
    class Person(BaseModel):
        name: str
        age: int

    model.says = ['{"name": "A"}', "no JSON", '```json\n{"name": "A", "age": 3}\n```']
    answer = chat.parse(**ASK, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="A", age=3)
    assert len(model.asked) == 3 and len({sent(model, i) for i in range(3)}) == 3
    assert [asked["response_format"]["type"] for asked in model.asked if "response_format" in asked] == []
    assert answer.usage.completion_tokens > 10, "those of the answers that did not fit are counted"
    assert "schema" not in json.dumps([{k: v for k, v in a.items() if k != "prompt_embeds"} for a in model.asked])


def test_the_model_is_told_in_its_last_turn_and_hidden(agent_sgt):
    turns = told(ASK["messages"], Promise(PERSON).words())
    prompt = agent_sgt.prompt(turns)
    clear = agent_sgt.tokenizer.decode([i for i, m in zip(prompt.ids, prompt.mask, strict=True) if not m])
    assert "integer" in agent_sgt.tokenizer.decode(prompt.ids) and "integer" not in clear
    before = agent_sgt.prompt(ASK["messages"])
    alike = next(i for i, (a, b) in enumerate(zip(before.ids, prompt.ids, strict=False)) if a != b)
    assert agent_sgt.tokenizer.decode(before.ids[:alike]).endswith("who?"), "held noise of all before it"
    parts = told([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "b")
    assert parts[0]["content"][-1]["text"] == "b" and told([{"role": "tool", "content": "a"}], "b")[1]["content"] == "b"


def test_a_stream_of_a_schema_comes_whole(chat, model):
    model.says = ['{"age": "x"}', '{"age": 3}']
    chunks = list(chat.create(**ASK, **form(PERSON), stream=True, stream_options={"include_usage": True}))
    assert [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content] == ['{"age": 3}']
    assert chunks[-1].usage.completion_tokens > 5


def test_answers_that_never_fit_are_an_error(chat, model):
    model.says = "never"
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="do not fit what was asked for, 3 times") as refused:
            list(chat.create(**ASK, **form(PERSON), stream=stream))
        assert refused.value.status_code == 502 and refused.value.code == "answer_does_not_fit"


def test_an_answer_that_was_cut_off_is_handed_on_as_that(chat, model):
    model.says, model.finish = '{"age', "length"
    try:
        assert chat.create(**ASK, **form(PERSON)).choices[0].finish_reason == "length" and len(model.asked) == 1
    finally:
        model.finish = "stop"


def test_a_call_that_is_forced(chat, model):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        model.says = ["I would rather talk.", CALL.replace("city", "town"), CALL]
        found = chat.create(**ASK, tools=[TOOL], tool_choice=choice).choices[0]
        assert found.finish_reason == "tool_calls"
        assert json.loads(found.message.tool_calls[0].function.arguments) == {"city": "Rome"}
    assert len(model.asked) == 6


def test_only_one_call_where_one_is_wanted(chat, model):
    model.says = CALL + CALL
    assert len(chat.create(**ASK, tools=[TOOL]).choices[0].message.tool_calls) == 2
    one = chat.create(**ASK, tools=[TOOL], parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"


def test_json_object_is_checked_here_where_a_server_could_not_hold_to_it(chat, model):
    """The template of this model thinks: held to an object, it could not."""
    model.says = ["<think>hm</think>no", '<think>hm</think>{"a": 1}']
    found = chat.create(**ASK, response_format={"type": "json_object"}).choices[0].message
    assert (found.content, found.reasoning_content) == ('{"a": 1}', "hm") and sent(model, 0) == sent(model, 1)
    assert "response_format" not in model.asked[0]
    model.says = '{"a": 1}'
    quick = {"chat_template_kwargs": {"enable_thinking": False}}
    assert chat.create(**ASK, response_format={"type": "json_object"}, extra_body=quick).choices[0].message.content
    assert model.asked[-1]["response_format"] == {"type": "json_object"}, "a thought that the template has closed"


def test_json_object_is_the_servers_where_it_can_be(chat_export):
    from sgt_titan.client import StainedGlassTransform

    model, sgt = Scripted(128), StainedGlassTransform.from_pretrained(chat_export)
    model.says = "{}"
    with (
        running(create_app(Settings("http://u"), sgt, httpx.MockTransport(model))) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="unused") as client,
    ):
        ask = {**ASK, "max_tokens": 9, "response_format": {"type": "json_object"}}
        assert client.chat.completions.create(**ask).choices[0].message.content == "{}"
        assert model.asked[-1]["response_format"] == {"type": "json_object"}


def test_responses_with_a_schema_and_a_forced_call(app, model):
    with openai.OpenAI(base_url=app + "/v1", api_key="unused", max_retries=0) as client:
        model.says = ["no", '{"age": 3}']
        text = {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}
        assert client.responses.create(model="m", input="who?", text=text).output_text == '{"age": 3}'
        model.says = ["no", CALL]
        choice = {"type": "function", "name": "weather"}
        tool = {"type": "function", **TOOL["function"]}
        (call,) = client.responses.create(model="m", input="who?", tools=[tool], tool_choice=choice).output
        assert call.name == "weather"


def test_values_stay_hidden_in_words_and_complaints(agent_sgt):
    model = Scripted()
    private = Private.of("patterns", key=b"k" * 32)
    seen = []
    for mail in ("ada@post.org", "bob@mail.net"):
        model.asked.clear()
        model.says = ["no", '{"to": 3}', '{"to": "x"}']
        ask = {"model": "m", "messages": [{"role": "user", "content": f"mail {mail}"}]}
        schema = {"type": "object", "properties": {"to": {"enum": [mail, "x"]}}}
        settings = Settings("http://u", private=private)
        with (
            running(create_app(settings, agent_sgt, httpx.MockTransport(model))) as url,
            openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0) as client,
        ):
            assert client.chat.completions.create(**ask, **form(schema)).choices[0].message.content == '{"to": "x"}'
        seen.append([asked["prompt_embeds"] for asked in model.asked])
    assert seen[0] == seen[1] and len(seen[0]) == 3, "the same bytes whatever the value is"


@pytest.mark.parametrize(
    "body, message",
    [
        (form({"type": "array"}), "of an object"),
        (form({"type": "object", "properties": 3}), "cannot be used: it is none"),
        (form({"type": "object", "$ref": "https://evil.example/x"}), "refers to something outside"),
        (form(PERSON) | {"n": 2}, "n: only 1"),
        ({"tool_choice": "required"}, "not in tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": CANARY}}}, "not in tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": CANARY}}}, "with a schema"),
        ({"guided_json": {CANARY: 1}}, "checked here"),
    ],
)
def test_what_cannot_be_promised(chat, model, body, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        chat.create(**ASK, extra_body=body)
    assert CANARY not in str(refused.value) and not model.asked


@pytest.mark.parametrize(
    "schema, text",
    [
        ({"type": "object", "patternProperties": {"(a+)+$": {}}}, json.dumps({"a" * 40 + "b": 1})),
        ({"$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {}},
          "$ref": "#/$defs/d0"}, "{}"),
    ],
    ids=["an expression", "references"],
)  # fmt: skip
def test_a_schema_that_would_never_end(monkeypatch, schema, text):
    monkeypatch.setattr(promise, "CPU_SECONDS", 1)
    with pytest.raises(UserError, match="too long to check"):
        Promise(schema).complaint(Delta(text=text))


def test_a_reference_into_nothing_and_what_is_no_json():
    with pytest.raises(UserError, match="not in it"):
        Promise({"type": "object", "$ref": "#/$defs/none"}).complaint(Delta(text="{}"))
    assert "no JSON" in Promise(PERSON).complaint(Delta(text="[" * 100_000))
    assert Promise(PERSON).complaint(Delta(text='{"age": NaN}')) and bare("```\n{}\n```") == "{}"
