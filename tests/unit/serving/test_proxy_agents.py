"""What agents need: tool loops, reasoning, JSON, prefills, /v1/responses, through OpenAI's own client.

The upstream writes what a test has it write, so that what a model of a family writes can be recorded once.
"""

import json
import re
from contextlib import contextmanager

import httpx
import openai
import pytest

from sgt_titan.private import Private
from sgt_titan.serving.app import create_app
from sgt_titan.serving.settings import Settings
from tests.stub_servers import Scripted, running

CANARY = "Zorblax-7741"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASK = {"model": "m", "messages": [{"role": "user", "content": "how is Rome?"}]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture(scope="module")
def sgt(agent_sgt):
    return agent_sgt


@pytest.fixture
def model():
    return Scripted()


@contextmanager
def client(sgt, model, **settings):
    app = create_app(Settings("http://u", **settings), sgt, httpx.MockTransport(model))
    with running(app) as url, openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def shared_model():
    return Scripted()


@pytest.fixture(scope="module")
def shared(sgt, shared_model):
    with client(sgt, shared_model) as found:
        yield found


def test_a_tool_loop(sgt, shared, shared_model):
    shared_model.says = CALL
    first = shared.chat.completions.create(**ASK, tools=[TOOL]).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content is None
    (call,) = first.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Rome"}
    shared_model.says = "Sunny."
    result = {"role": "tool", "tool_call_id": call.id, "content": 'it said "sun"\nand more'}
    turns = [*ASK["messages"], first.message.model_dump(exclude_none=True), result]
    second = shared.chat.completions.create(model="m", messages=turns, tools=[TOOL])
    assert second.choices[0].message.content == "Sunny." and second.choices[0].finish_reason == "stop"
    prompt = sgt.prompt(turns, tools=[TOOL])
    text = sgt.tokenizer.decode(prompt.ids)
    clear = sgt.tokenizer.decode([i for i, hidden in zip(prompt.ids, prompt.mask, strict=True) if not hidden])
    assert "<tool>it said" in text and "Rome" in text.partition("<tool>")[0].partition("how is Rome?")[2]
    assert not re.search("Rome|weather|sun|how is", clear)


def test_a_streamed_call(shared, shared_model):
    shared_model.says = "Let me see. " + CALL
    chunks = list(shared.chat.completions.create(**ASK, tools=[TOOL], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(d.content or "" for d in deltas) == "Let me see. "
    (call,) = [c for d in deltas for c in d.tool_calls or ()]
    assert call.index == 0 and call.function.name == "weather" and call.id.startswith("call_")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_values_in_thoughts_and_calls_of_an_agent(sgt, model):
    """Surrogates cut over the events come back in thoughts and in the arguments of calls, and go out again hidden."""
    private = Private.of("patterns", key=b"k" * 32)
    first = {"role": "user", "content": "weather for ada@post.org"}
    talk = private.conversation(private.name_of([first["content"]]))
    surrogate = talk.hide([first["content"]])[0].replaced[0].surrogate
    with client(sgt, model, private=private) as found:
        model.says = f"<think>{surrogate}</think>" + CALL.replace("Rome", surrogate)
        for stream in (False, True):
            got = found.chat.completions.create(model="m", messages=[first], tools=[TOOL], stream=stream)
            choices = [chunk.choices[0] for chunk in got if chunk.choices] if stream else got.choices
            said = [choice.delta if stream else choice.message for choice in choices]
            (call,) = [call for message in said for call in message.tool_calls or ()]
            assert json.loads(call.function.arguments) == {"city": "ada@post.org"}
            assert not any(surrogate in message.model_dump_json() for message in said)
        model.says, sent = "ok", []
        for mail in ("ada@post.org", "bob@mail.net"):
            arguments = call.function.arguments.replace("ada@post.org", mail)
            called = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
            turns = [
                {"role": "user", "content": f"weather for {mail}"},
                {"role": "assistant", "content": None, "reasoning_content": f"{mail}!", "tool_calls": [called]},
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            ]
            found.chat.completions.create(model="m", messages=turns, tools=[TOOL])
            sent.append(model.asked[-1])
    assert sent[0] == sent[1], "the same bytes whatever the value is"


def test_without_tools_and_with_a_format_said_otherwise_calls_are_text(sgt, model, shared, shared_model):
    shared_model.says = model.says = CALL
    assert shared.chat.completions.create(**ASK).choices[0].message.content == CALL
    assert shared.chat.completions.create(**ASK, tools=[TOOL], tool_choice="none").choices[0].message.content == CALL
    with client(sgt, model, tool_format="none") as plain:
        assert plain.chat.completions.create(**ASK, tools=[TOOL]).choices[0].message.content == CALL
    with client(sgt, model, tool_format="mistral") as other:
        model.says = '[TOOL_CALLS][{"name": "weather", "arguments": {}}]'
        message = other.chat.completions.create(**ASK, tools=[TOOL]).choices[0].message
        assert message.tool_calls and len(message.tool_calls[0].id) == 9
        assert model.asked[-1]["skip_special_tokens"] is False, "its marks would not have come"


def test_bare_arguments_have_the_types_of_the_tool(sgt, model):
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"properties": properties}}}
    model.says = (
        "<function=weather>\n<parameter=city>\n94107\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>"
    )
    with client(sgt, model, tool_format="qwen_xml") as found:
        (call,) = found.chat.completions.create(**ASK, tools=[tool]).choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "94107", "days": 3}


def test_half_a_character_in_arguments_ends_nothing(shared, shared_model):
    """Escaped, it is text to JSON, and none to UTF-8."""
    shared_model.says = CALL.replace("Rome", "\\ud83d")
    for stream in (False, True):
        got = shared.chat.completions.create(**ASK, tools=[TOOL], stream=stream)
        choices = [chunk.choices[0] for chunk in got if chunk.choices] if stream else got.choices
        said = [choice.delta if stream else choice.message for choice in choices]
        (call,) = [call for message in said for call in message.tool_calls or ()]
        assert json.loads(call.function.arguments) == {"city": "\ud83d"}


def test_reasoning(sgt, shared, shared_model):
    shared_model.says = "<think>\nhm\n</think>\n\nyes"
    message = shared.chat.completions.create(**ASK).choices[0].message
    assert message.content == "yes" and message.reasoning_content == "hm\n"
    turns = [*ASK["messages"], message.model_dump(exclude_none=True), {"role": "user", "content": "sure?"}]
    assert shared.chat.completions.create(model="m", messages=turns).choices[0].message.content == "yes"
    chunks = list(shared.chat.completions.create(**ASK, stream=True))
    thought = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks)
    assert thought == "hm\n" and "".join(c.choices[0].delta.content or "" for c in chunks) == "yes"
    shared_model.says = "hm</think>yes"
    opened = {"chat_template_kwargs": {"enable_thinking": True}}
    message = shared.chat.completions.create(**ASK, extra_body=opened).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "yes")


@pytest.mark.parametrize(
    "body, message",
    [
        ({"chat_template_kwargs": {"enable_thinking": CANARY}}, "would stand in the prompt in clear"),
        ({"chat_template_kwargs": {CANARY: True}}, "1 names: the chat template of this model has no such option"),
        ({"reasoning_effort": "low"}, "reasoning_effort: the chat template of this model has no such option"),
        ({"continue_final_message": True}, "only a last turn of the assistant"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"stop_token_ids": [77]}, "only those of special tokens"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"verbosity": "low"}, "verbosity: unsupported"),
        ({CANARY: 1}, "unknown field: unsupported"),
        ({"response_format": {"type": "json_schema"}}, "json_schema with a schema"),
        ({"tool_choice": {"type": "web"}, "tools": [TOOL]}, "a function of tools"),
    ],
)
def test_what_is_refused(shared, body, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        shared.chat.completions.create(**ASK, extra_body=body)
    assert CANARY not in str(refused.value)


def test_options_that_are_handed_on(shared, shared_model):
    shared_model.says = "{}"
    extra = {"min_tokens": 1, "ignore_eos": True, "skip_special_tokens": False, "stop_token_ids": [1]}
    shared.chat.completions.create(**ASK, extra_body=extra)
    asked = shared_model.asked[-1]
    assert {name: asked[name] for name in extra} == extra


def test_a_turn_that_is_to_be_continued(sgt, shared, shared_model):
    shared_model.says = " is fine"
    turns = [*ASK["messages"], {"role": "assistant", "content": "Rome"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    answer = shared.chat.completions.create(model="m", messages=turns, extra_body=extra)
    assert answer.choices[0].message.content == " is fine"
    prompt = sgt.prompt(turns, continued=True)
    assert sgt.tokenizer.decode(prompt.ids).endswith("<assistant>Rome") and prompt.mask[-4:].all()


def test_params_are_dropped_on_request_and_that_is_said(sgt, model):
    model.says = "ok"
    with client(sgt, model, drop_params=True, clamp_max_tokens=True, max_tokens=20) as found:
        extra = {"logit_bias": {"5": 1}, CANARY: 1, "verbosity": "low"}
        raw = found.chat.completions.with_raw_response.create(**ASK, max_completion_tokens=999, extra_body=extra)
        assert raw.parse().choices[0].message.content == "ok"
        assert raw.headers["x-dropped-params"] == "logit_bias, verbosity, 1 unknown"
        assert "logit_bias" not in model.asked[-1] and model.asked[-1]["max_tokens"] == 20


def test_responses(shared, shared_model):
    shared_model.says = "<think>hm</think>yes"
    found = shared.responses.create(model="m", input="how?", instructions="be brief", store=False, max_output_tokens=9)
    assert found.output_text == "yes" and [item.type for item in found.output] == ["reasoning", "message"]
    assert found.usage.input_tokens > 10 and found.status == "completed"
    asked = {"reasoning": {"summary": "auto"}, "text": {"verbosity": "medium", "format": {"type": "text"}}}
    assert shared.responses.create(model="m", input="how?", **asked).output_text == "yes"
    shared_model.says = CALL
    tool = {"type": "function", **TOOL["function"]}
    first = shared.responses.create(model="m", input="how is Rome?", tools=[tool])
    (call,) = first.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Rome"}
    shared_model.says = "Sunny."
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    turns = [{"role": "user", "content": "how is Rome?"}, *[item.model_dump() for item in first.output], result]
    assert shared.responses.create(model="m", input=turns, tools=[tool]).output_text == "Sunny."
    shared_model.finish = "length"
    try:
        cut = shared.responses.create(
            model="m", input=[{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]
        )
        assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    finally:
        shared_model.finish = "stop"


def test_streamed_responses(shared, shared_model):
    shared_model.says = "<think>hm</think>well " + CALL
    tool = {"type": "function", **TOOL["function"]}
    with shared.responses.stream(model="m", input="how?", tools=[tool]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "well " and final.output[2].arguments == '{"city": "Rome"}'
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    "body, message",
    [
        ({"input": "a", "previous_response_id": CANARY}, "nothing is stored here"),
        ({"input": "a", "store": True}, "nothing is stored here"),
        ({"input": 3}, "must be text or a list of items"),
        ({"input": [{"type": "item_reference", "id": CANARY}]}, r"input\[0\]: must be a message"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "only functions"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": CANARY}}}, "with a schema"),
        ({"input": "a", CANARY: 1}, "unknown field"),
        ({"input": "a", "text": CANARY}, "text: must be an object"),
        ({"input": "a", "text": {"verbosity": "low"}}, "text.verbosity: unsupported"),
        ({"input": "a", "text": {CANARY: "low"}}, "unknown field"),
        ({"input": "a", "reasoning": [CANARY]}, "reasoning: must be an object"),
        ({"input": "a", "reasoning": {"summary": "detailed"}}, "reasoning.summary: unsupported"),
        ({"input": [{"type": "reasoning", "content": 5}]}, r"input\[0\].content: must be a list"),
        ({"input": [{"type": "reasoning", "content": [{"text": [CANARY]}]}]}, r"input\[0\].content: must be text"),
    ],
)
def test_responses_that_are_refused(shared, body, message):
    found = httpx.post(f"{shared.base_url}responses", json={"model": "m", **body})
    assert (
        found.status_code == 400 and re.search(message, found.json()["error"]["message"]) and CANARY not in found.text
    )


def test_embeddings_are_refused_and_why(shared):
    with pytest.raises(openai.BadRequestError, match="not served here"):
        shared.embeddings.create(model="m", input=CANARY)
