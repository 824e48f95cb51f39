"""What Python's clients get of the proxy: ``python python_clients.py CLIENT PROXY SAY``, run by table.py.

``SAY`` is the address that sets what the model says next. One JSON line a feature: works, refused (by the proxy, with
its reason), none (the client has no such thing) or failed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.request
from collections.abc import Callable

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "OPENAI_API_KEY": "unused"}

CLIENT, URL, SAY = sys.argv[1:4]
QUESTION = [{"role": "user", "content": "how is Rome?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ADA = '{"name": "Ada", "age": 36}'
PERSON_CALL = f'<tool_call>{{"name": "Person", "arguments": {ADA}}}</tool_call>'
DOT = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
DOT += "RU5ErkJggg=="
LONG = "word " * 8000

Feature = tuple[str | list[str], Callable[[], object]]


def say(words: str | list[str]) -> None:
    data = json.dumps(words).encode()
    urllib.request.urlopen(urllib.request.Request(SAY, data, {"content-type": "application/json"})).read()


def run(features: dict[str, Feature | str]) -> None:
    """``features``: what the model says and what is done; or why the client has no such thing."""
    for name, feature in features.items():
        if isinstance(feature, str):
            outcome, why = "none", feature
        else:
            say(feature[0])
            try:
                found = feature[1]()
                outcome, why = "works", found if isinstance(found, str) else ""
            except Exception as error:
                outcome, why = judged(error)
        print(json.dumps({"client": CLIENT, "feature": name, "outcome": outcome, "why": why}), flush=True)


def judged(error: BaseException | None) -> tuple[str, str]:
    """Refused if the proxy's 400 is at the bottom of it, whatever the client has made of that."""
    first = error
    while error is not None:
        body = getattr(error, "body", None)
        if getattr(error, "status_code", None) == 400:
            message = body.get("message") if isinstance(body, dict) else _ours(str(error))
            return "refused", f"{type(first).__name__}: {message}"
        error = error.__cause__ or error.__context__
    return "failed", f"{type(first).__name__}: {str(first)[:300]}"


def _ours(text: str) -> str:
    """The proxy's message out of a client's own words around it."""
    found = re.search("'message': '([^']*)'", text)
    return found[1] if found else text


def same(found: object, wanted: object) -> None:
    assert found == wanted, f"{found!r}, not {wanted!r}"


def refused(ask: Callable[[], object]) -> Callable[[], object]:
    """For what has to be refused: an answer is a failure."""

    def go() -> object:
        raise AssertionError(f"was answered: {ask()!r:.100}")

    return go


def openai_python() -> dict[str, Feature | str]:
    import openai
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0)
    chat, ask = client.chat.completions, {"model": "m", "messages": QUESTION}

    def text(**more):
        return chat.create(**ask | more).choices[0].message.content

    def stream(**more):
        return [c for c in chat.create(**ask, stream=True, **more)]

    def streamed():
        same("".join(c.choices[0].delta.content or "" for c in stream()), "fine")

    def counted():
        assert stream(stream_options={"include_usage": True})[-1].usage.completion_tokens > 0

    def loop():
        first = chat.create(**ask, tools=[TOOL]).choices[0].message
        (call,) = first.tool_calls
        same(json.loads(call.function.arguments), {"city": "Rome"})
        result = {"role": "tool", "tool_call_id": call.id, "content": '"sun"\n'}
        say("Sunny.")
        turns = [*QUESTION, first.model_dump(exclude_none=True), result]
        same(chat.create(model="m", messages=turns, tools=[TOOL]).choices[0].message.content, "Sunny.")

    def called():
        with chat.stream(**ask, tools=[TOOL]) as found:
            for _ in found:
                pass
            message = found.get_final_completion().choices[0].message
        same(json.loads(message.tool_calls[0].function.arguments), {"city": "Rome"})

    def forced():
        choice = {"type": "function", "function": {"name": "weather"}}
        assert chat.create(**ask, tools=[TOOL], tool_choice=choice).choices[0].message.tool_calls

    def schema():
        same(chat.parse(**ask, response_format=Person).choices[0].message.parsed.age, 36)

    def thoughts():
        message = chat.create(**ask).choices[0].message
        same((message.content, message.reasoning_content), ("fine", "hm"))

    def roles():
        parts = [{"type": "text", "text": "how is Rome?"}]
        turns = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
        same(text(messages=turns), "fine")

    def image():
        parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": DOT}}]
        return text(messages=[{"role": "user", "content": parts}])

    def answers():
        found = client.responses.create(model="m", input="how is Rome?", store=False)
        same(found.output_text, "fine")
        with client.responses.stream(model="m", input="how is Rome?", store=False) as events:
            assert list(events)[-1].type == "response.completed"

    def too_long():
        try:
            text(messages=[{"role": "user", "content": LONG}])
        except openai.BadRequestError as error:
            same(error.code, "context_length_exceeded")
            return "BadRequestError, code context_length_exceeded"
        raise AssertionError("was answered")

    return {
        "chat": ("fine", lambda: same(text(), "fine")),
        "stream": ("fine", streamed),
        "usage of a stream": ("fine", counted),
        "tool loop": (CALL, loop),
        "streamed call": (CALL, called),
        "forced call": (["hm", CALL], forced),
        "JSON object": ('{"a": 1}', lambda: same(text(response_format={"type": "json_object"}), '{"a": 1}')),
        "schema": (["hm", ADA], schema),
        "thoughts": ("<think>hm</think>fine", thoughts),
        "roles and parts": ("fine", roles),
        "several answers": ("fine", lambda: same(len(chat.create(**ask, n=3).choices), 3)),
        "stop": ("fine STOP more", lambda: same(text(stop=["STOP"]), "fine ")),
        "/v1/completions": (
            "fine",
            lambda: same(client.completions.create(model="m", prompt="a").choices[0].text, "fine"),
        ),
        "/v1/responses": ("fine", answers),
        "list of models": ("", lambda: same([m.id for m in client.models.list()], ["m"])),
        "too long a prompt": ("fine", too_long),
        "embeddings": ("", refused(lambda: client.embeddings.create(model="m", input="a"))),
        "image": ("", refused(image)),
    }  # fmt: skip


def langchain() -> dict[str, Feature | str]:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return f'it is "sunny" in\n{city}'

    where = {"model": "m", "base_url": URL, "api_key": "unused", "max_retries": 0}
    chat = ChatOpenAI(**where)

    def structured(**how):
        return chat.with_structured_output(Person, **how).invoke("who? as JSON").age

    def several():
        same(len(ChatOpenAI(**where, n=3).generate([[HumanMessage("how?")]]).generations[0]), 3)

    def counted():
        chunks = list(ChatOpenAI(**where, stream_usage=True).stream("how is Rome?"))
        assert any(c.usage_metadata and c.usage_metadata["output_tokens"] for c in chunks)

    def loop():
        bound, turns = chat.bind_tools([weather]), [("user", "how is Rome?")]
        first = bound.invoke(turns)
        same([c["args"] for c in first.tool_calls], [{"city": "Rome"}])
        say("Sunny.")
        same(bound.invoke([*turns, first, weather.invoke(first.tool_calls[0])]).content, "Sunny.")

    def called():
        whole = None
        for chunk in chat.bind_tools([weather]).stream("how is Rome?"):
            whole = chunk if whole is None else whole + chunk
        same([c["args"] for c in whole.tool_calls], [{"city": "Rome"}])

    def forced():
        assert chat.bind_tools([weather], tool_choice="any").invoke("how is Rome?").tool_calls
        say(["hm", PERSON_CALL])
        same(structured(method="function_calling"), 36)

    def too_long():
        try:
            chat.invoke(LONG)
        except Exception as error:
            assert "at most" in str(error) or "context" in str(error).lower(), str(error)
            return type(error).__name__
        raise AssertionError("was answered")

    return {
        "chat": ("fine", lambda: same(chat.invoke("how is Rome?").content, "fine")),
        "stream": ("fine", lambda: same("".join(c.content for c in chat.stream("how is Rome?")), "fine")),
        "usage of a stream": ("fine", counted),
        "tool loop": (CALL, loop),
        "streamed call": (CALL, called),
        "forced call": (["hm", CALL], forced),
        "JSON object": (ADA, lambda: same(structured(method="json_mode"), 36)),
        "schema": (["hm", ADA], lambda: same(structured(), 36)),
        "thoughts": "`ChatOpenAI` reads no `reasoning_content`; the answer itself is right",
        "roles and parts": (
            "fine",
            lambda: same(
                chat.invoke(
                    [("system", "be brief"), ("user", [{"type": "text", "text": "how is Rome?"}])]
                ).content,
                "fine",
            ),
        ),
        "several answers": ("fine", several),
        "stop": ("fine STOP more", lambda: same(chat.invoke("how is Rome?", stop=["STOP"]).content, "fine ")),
        "/v1/completions": ("fine", lambda: same(OpenAI(**where, max_tokens=9).invoke("a"), "fine")),
        "/v1/responses": (
            "fine",
            lambda: same(ChatOpenAI(**where, use_responses_api=True, store=False).invoke("how is Rome?").text, "fine"),
        ),
        "list of models": "has none",
        "too long a prompt": ("fine", too_long),
        "embeddings": (
            "",
            refused(lambda: OpenAIEmbeddings(**where, check_embedding_ctx_length=False).embed_query("a")),
        ),
        "image": (
            "",
            refused(lambda: chat.invoke([("user", [{"type": "image_url", "image_url": {"url": DOT}}])])),
        ),
    }  # fmt: skip


def litellm() -> dict[str, Feature | str]:
    import litellm
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    where = {"api_base": URL, "api_key": "unused", "max_retries": 0}

    def create(**more):
        return litellm.completion(**{"model": "openai/m", "messages": QUESTION} | where | more)

    def text(**more):
        return create(**more).choices[0].message.content

    def counted():
        chunks = list(create(stream=True, stream_options={"include_usage": True}))
        assert any(getattr(c, "usage", None) and c.usage.completion_tokens for c in chunks)

    def loop():
        first = create(tools=[TOOL]).choices[0].message
        (call,) = first.tool_calls
        same(json.loads(call.function.arguments), {"city": "Rome"})
        say("Sunny.")
        result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
        same(text(messages=[*QUESTION, first.model_dump(), result], tools=[TOOL]), "Sunny.")

    def called():
        whole = litellm.stream_chunk_builder(list(create(tools=[TOOL], stream=True)))
        same(json.loads(whole.choices[0].message.tool_calls[0].function.arguments), {"city": "Rome"})

    def forced():
        choice = {"type": "function", "function": {"name": "weather"}}
        assert create(tools=[TOOL], tool_choice=choice).choices[0].message.tool_calls

    def thoughts():
        message = create().choices[0].message
        same((message.content, message.reasoning_content), ("fine", "hm"))

    def too_long():
        try:
            text(messages=[{"role": "user", "content": LONG}])
        except litellm.BadRequestError as error:
            return type(error).__name__
        raise AssertionError("was answered")

    def completed():
        found = litellm.text_completion(model="text-completion-openai/m", prompt="a", **where)
        same(found.choices[0].text, "fine")

    return {
        "chat": ("fine", lambda: same(text(), "fine")),
        "stream": (
            "fine",
            lambda: same("".join(c.choices[0].delta.content or "" for c in create(stream=True)), "fine"),
        ),
        "usage of a stream": ("fine", counted),
        "tool loop": (CALL, loop),
        "streamed call": (CALL, called),
        "forced call": (["hm", CALL], forced),
        "JSON object": ('{"a": 1}', lambda: same(text(response_format={"type": "json_object"}), '{"a": 1}')),
        "schema": (["hm", ADA], lambda: same(json.loads(text(response_format=Person))["age"], 36)),
        "thoughts": ("<think>hm</think>fine", thoughts),
        "roles and parts": (
            "fine",
            lambda: same(
                text(
                    messages=[
                        {"role": "developer", "content": "be brief"},
                        {"role": "user", "content": [{"type": "text", "text": "how is Rome?"}]},
                    ]
                ),
                "fine",
            ),
        ),
        "several answers": ("fine", lambda: same(len(create(n=3).choices), 3)),
        "stop": ("fine STOP more", lambda: same(text(stop=["STOP"]), "fine ")),
        "/v1/completions": ("fine", completed),
        "/v1/responses": (
            "fine",
            lambda: same(
                litellm.responses(model="openai/m", input="how?", store=False, api_base=URL, api_key="unused")
                .output[0].content[0].text,
                "fine",
            ),
        ),
        "list of models": "has none",
        "too long a prompt": ("fine", too_long),
        "embeddings": ("", refused(lambda: litellm.embedding(model="openai/m", input=["a"], **where))),
        "image": (
            "",
            refused(
                lambda: text(
                    messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": DOT}}]}]
                )
            ),
        ),
    }  # fmt: skip


def llamaindex() -> dict[str, Feature | str]:
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.tools import FunctionTool
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding
    from llama_index.llms.openai_like import OpenAILike
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    def weather(city: str) -> str:
        """The weather of a city."""
        return f'it is "sunny" in\n{city}'

    where = {"model": "m", "api_base": URL, "api_key": "unused", "max_retries": 0, "context_window": 4096}
    chat = OpenAILike(**where, is_chat_model=True, is_function_calling_model=True)
    question, tool = [ChatMessage(role="user", content="how is Rome?")], FunctionTool.from_defaults(weather)

    def loop():
        first = chat.chat_with_tools([tool], chat_history=question)
        (call,) = chat.get_tool_calls_from_response(first)
        same(call.tool_kwargs, {"city": "Rome"})
        say("Sunny.")
        more = {"tool_call_id": call.tool_id}
        result = ChatMessage(role="tool", content=str(tool(**call.tool_kwargs)), additional_kwargs=more)
        same(chat.chat_with_tools([tool], chat_history=[*question, first.message, result]).message.content, "Sunny.")

    def called():
        *_, last = chat.stream_chat_with_tools([tool], chat_history=question)
        same(chat.get_tool_calls_from_response(last)[0].tool_kwargs, {"city": "Rome"})

    def forced():
        found = chat.chat_with_tools([tool], chat_history=question, tool_required=True)
        assert chat.get_tool_calls_from_response(found)
        say(["hm", PERSON_CALL])
        same(chat.structured_predict(Person, PromptTemplate("who?")).age, 36)

    def schema():
        model = OpenAILike(**where, is_chat_model=True, should_use_structured_outputs=True)
        same(model.structured_predict(Person, PromptTemplate("who?")).age, 36)

    def too_long():
        try:
            chat.chat([ChatMessage(role="user", content=LONG)])
        except Exception as error:
            assert judged(error)[0] == "refused", error
            return type(error).__name__
        raise AssertionError("was answered")

    return {
        "chat": ("fine", lambda: same(chat.chat(question).message.content, "fine")),
        "stream": ("fine", lambda: same("".join(c.delta or "" for c in chat.stream_chat(question)), "fine")),
        "usage of a stream": "asks for none",
        "tool loop": (CALL, loop),
        "streamed call": (CALL, called),
        "forced call": (["hm", CALL], forced),
        "JSON object": (
            '{"a": 1}',
            lambda: same(chat.chat(question, response_format={"type": "json_object"}).message.content, '{"a": 1}'),
        ),
        "schema": (["hm", ADA], schema),
        "thoughts": "`OpenAILike` reads no `reasoning_content`; the answer itself is right",
        "roles and parts": (
            "fine",
            lambda: same(
                chat.chat([ChatMessage(role="system", content="be brief"), *question]).message.content, "fine"
            ),
        ),
        "several answers": "returns one",
        "stop": ("fine STOP more", lambda: same(chat.chat(question, stop=["STOP"]).message.content, "fine ")),
        "/v1/completions": ("fine", lambda: same(OpenAILike(**where).complete("a").text, "fine")),
        "/v1/responses": "`OpenAILike` has none",
        "list of models": "has none",
        "too long a prompt": ("fine", too_long),
        "embeddings": (
            "",
            refused(
                lambda: OpenAILikeEmbedding(
                    model_name="m", api_base=URL, api_key="unused", max_retries=0
                ).get_text_embedding("a")
            ),
        ),
        "image": (
            "",
            refused(
                lambda: chat.chat(
                    [ChatMessage(role="user", blocks=[TextBlock(text="what?"), ImageBlock(url=DOT)])]
                )
            ),
        ),
    }  # fmt: skip


def instructor() -> dict[str, Feature | str]:
    import instructor
    import openai
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    bare = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0)
    ask = {"model": "m", "messages": QUESTION, "response_model": Person, "max_retries": 1}

    def made(mode, **more):
        return instructor.from_openai(bare, mode=mode).chat.completions.create(**ask | more).age

    def partial():
        client = instructor.from_openai(bare, mode=instructor.Mode.JSON)
        *_, last = client.chat.completions.create_partial(**ask)
        same(last.age, 36)

    def again():
        same(made(instructor.Mode.MD_JSON, max_retries=3), 36)

    def too_long():
        try:
            made(instructor.Mode.JSON, messages=[{"role": "user", "content": LONG}])
        except Exception as error:
            assert judged(error)[0] == "refused" and "at most" in str(error), error
            return type(error).__name__
        raise AssertionError("was answered")

    modes = instructor.Mode
    only = "is for structured answers"
    return {
        "chat": (["{}", f"```json\n{ADA}\n```"], again),
        "stream": (ADA, partial),
        "usage of a stream": only,
        "tool loop": only,
        "streamed call": only,
        "forced call": (["hm", PERSON_CALL], lambda: same(made(modes.TOOLS), 36)),
        "JSON object": (ADA, lambda: same(made(modes.JSON), 36)),
        "schema": (["hm", ADA], lambda: same(made(modes.JSON_SCHEMA), 36)),
        "thoughts": ("<think>hm</think>" + ADA, lambda: same(made(modes.JSON), 36)),
        "roles and parts": (
            ADA,
            lambda: same(made(modes.JSON, messages=[{"role": "system", "content": "be brief"}, *QUESTION]), 36),
        ),
        "several answers": only,
        "stop": only,
        "/v1/completions": only,
        "/v1/responses": (PERSON_CALL, lambda: same(made(modes.RESPONSES_TOOLS), 36)),
        "list of models": only,
        "too long a prompt": ("fine", too_long),
        "embeddings": only,
        "image": only,
    }


if __name__ == "__main__":
    run({name: table for name, table in globals().items() if callable(table)}[CLIENT]())
