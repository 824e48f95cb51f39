"""The optional judge of PII leaks: a language model behind an OpenAI-compatible endpoint, as in PAPILLON.

It is sent the reconstruction and the private value, so private text leaves this machine: only by ``--judge``, and to
the URL given there. Nothing of it is logged. The API key, where one is needed, is read from an environment variable.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from sgt_titan import outgoing
from sgt_titan.errors import UserError
from sgt_titan.evaluation.scores.pii import is_in, ratios

if TYPE_CHECKING:
    import httpx

QUESTION = (
    "You audit a privacy tool. Below are a private VALUE and a TEXT that an attacker reconstructed. Could the attacker "
    "learn the value from the text, allowing for small misspellings? Answer with one word, yes or no.\n\n"
    "VALUE: {unit}\n\nTEXT: {text}"
)
ATTEMPTS, TIMEOUT, PARALLEL = 4, 60.0, 8
MAX_ANSWER = 1 << 20  # bytes
RETRIED = {408, 409, 429, 500, 502, 503, 504}


def judge(
    base_url: str,
    model: str,
    originals: Sequence[str],
    reconstructions: Sequence[str],
    units: Sequence[Sequence[str]],
    *,
    api_key_env: str = "OPENAI_API_KEY",
    timeout: float = TIMEOUT,
    pause: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """judge_micro and judge_macro as JSON values of estimates; one question per prompt and value.

    Args:
        base_url: up to and with ``/v1``.
        pause: seconds before the first repetition of a question that failed; doubles each time.

    Raises:
        UserError: the endpoint cannot be reached, refuses, or does not answer yes or no.
    """
    asked = [
        (i, unit, text)
        for i, (original, text, these) in enumerate(zip(originals, reconstructions, units, strict=True))
        for unit in these
        if is_in(unit, original)
    ]
    key = os.environ.get(api_key_env) or None
    with outgoing.client(timeout=timeout, key=key) as client, ThreadPoolExecutor(PARALLEL) as pool:
        answers = list(
            pool.map(lambda ask: _ask(client, base_url, model, *ask[1:], seconds=timeout, pause=pause), asked)
        )
    flags: list[list[bool]] = [[] for _ in originals]
    for (i, _, _), answer in zip(asked, answers, strict=True):
        flags[i].append(answer)
    return ratios("judge", flags)


def _ask(
    client: httpx.Client, base_url: str, model: str, unit: str, text: str, *, seconds: float, pause: float
) -> bool:
    url = base_url.rstrip("/") + "/chat/completions"
    question = {"role": "user", "content": QUESTION.format(unit=unit, text=text)}
    body = {"model": model, "messages": [question], "temperature": 0, "max_tokens": 3}
    http_error = outgoing.require_httpx().HTTPError
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            status, answer = outgoing.exchange(client, "POST", url, json=body, most=MAX_ANSWER, seconds=seconds)
        except outgoing.require_httpx().RemoteProtocolError:
            problem = "breaks off or does not speak HTTP"
            continue
        except http_error as error:
            problem = f"cannot be reached ({type(error).__name__})"
            continue
        if status != 200:
            problem = f"answers {status}"
            if status not in RETRIED:
                break
            continue
        try:
            said = json.loads(answer)["choices"][0]["message"]["content"].strip().casefold()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            problem = "does not answer as an OpenAI chat completion"
            continue
        word = said.split()[0].strip(".,!\"'*") if said else ""
        if word in ("yes", "no"):
            return word == "yes"
        problem = "does not answer yes or no"  # what it said may repeat the private text
    raise UserError(f"--judge: {url} (model {model}) {problem}")
