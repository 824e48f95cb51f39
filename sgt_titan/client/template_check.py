"""A chat template is a program of whoever made the export: tried in a process of its own before it is trusted.

Templates run in jinja's sandbox, which keeps them from the machine, not from its time and memory: a loop in a loop, or
a text times a thousand million, would hang or fill the process at the first prompt. So, at load, the template renders
small chats in a child process that has few seconds and little memory, and what it makes of them must be small.
"""

from __future__ import annotations

from functools import lru_cache

from sgt_titan.client.confined import TOO_LONG, confined
from sgt_titan.errors import UserError

SECONDS = 10
CPU_SECONDS = 4
MEMORY = 1 << 30
LONGEST = 1 << 20  # characters of a chat of a few words

_CHILD = r"""
import json, sys
longest = int(sys.argv[3])
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

def refuse(message=""):
    raise TemplateError(message)

extensions = ["jinja2.ext.loopcontrols", Generation]
env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
env.filters["tojson"] = lambda x, *a, **k: json.dumps(x, ensure_ascii=False, default=str)
env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "2026-01-01"}
try:
    template = env.from_string(sys.stdin.read())
except TemplateError:
    sys.exit(0)  # what transformers makes of it, it says itself
user, answer = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}
system = {"role": "system", "content": "e f"}
parameters = {"type": "object", "properties": {}}
tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}
for messages in ([user], [system, user], [system] + [user, answer] * 20 + [user]):
    for tools in (None, [tool]):
        size = 0
        try:
            for piece in template.generate(
                messages=messages, tools=tools, add_generation_prompt=True, bos_token="<s>", eos_token="</s>",
                documents=None,
            ):
                size += len(piece)
                if size > longest:
                    sys.exit(3)
        except MemoryError:
            sys.exit(4)
        except SystemExit:
            raise
        except OverflowError:
            sys.exit(4)
        except Exception:
            continue
"""


@lru_cache(maxsize=64)
def check_template(template: str) -> None:
    """Raise UserError for a template that takes too long, too much memory, or writes too much."""
    given, limits = template.encode("utf-8", "surrogatepass"), {"cpu_seconds": CPU_SECONDS, "memory": MEMORY}
    try:
        code, _ = confined(_CHILD, given, str(LONGEST), seconds=SECONDS, **limits)
    except OSError:  # no process can be had here; the template runs as it did before there was this check
        return
    if code in TOO_LONG:
        raise UserError(
            "chat template: takes too long over a chat of a few words; take the export from where you trust"
        )
    if code in (3, 4):
        raise UserError(
            "chat template: makes far too much of a chat of a few words; take the export from where you trust"
        )
