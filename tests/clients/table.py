"""What each client gets of the proxy: the table in docs/SERVING.md, made by running them.

    make clients                                    # sets up .venv-clients, runs all, writes the table
    python tests/clients/table.py langchain         # one of them; prints only

The proxy is the real one over a small export; its upstream says what a feature needs (``stub_servers.Scripted``), since
what is tried is whether a client and the proxy understand each other, not a model. Exit code 1 if anything failed that
was neither refused by the proxy nor unknown to the client.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import httpx
from fastapi import FastAPI, Request

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgt_titan.serving.app import create_app
from sgt_titan.serving.settings import Settings
from tests.conftest import write_trunk
from tests.serving_kit import load_agent, with_chat_template
from tests.stub_servers import Scripted, running

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".venv-clients"
PAGE, BEGIN, END = ROOT / "docs/SERVING.md", "<!-- tests/clients/table.py -->\n", "<!-- end -->\n"
# client -> heading, and its package, whose version is shown
PYTHON = {
    "openai_python": ("OpenAI Python", "openai"),
    "langchain": ("LangChain", "langchain-openai"),
    "litellm": ("LiteLLM", "litellm"),
    "llamaindex": ("LlamaIndex", "llama-index-llms-openai-like"),
    "instructor": ("instructor", "instructor"),
}
NODE = {"openai_node": ("OpenAI JavaScript", "openai"), "vercel": ("Vercel AI SDK", "ai")}


def sayer(model: Scripted) -> FastAPI:
    app = FastAPI()

    @app.post("/say")
    async def say(request: Request) -> None:
        model.says = await request.json()

    return app


def results(client: str, url: str, say: str, python: Path, node: Path) -> list[dict]:
    """The lines of one client's script."""
    if client in PYTHON:
        command, where = [str(python), str(HERE / "python_clients.py")], HERE
    else:
        script = node / "node_clients.mjs"  # beside its packages, where node looks for them
        script.write_text((HERE / "node_clients.mjs").read_text())
        command, where = ["node", str(script)], node
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*command, client, url, say], cwd=where, env=environment, capture_output=True)
    lines = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]
    if done.returncode:
        words = done.stderr.decode()[-500:]
        lines.append({"client": client, "feature": "the script", "outcome": "failed", "why": words})
    return lines


def version(client: str, python: Path, node: Path) -> str:
    if client in NODE:
        return json.loads((node / "node_modules" / NODE[client][1] / "package.json").read_text())["version"]
    code = f"from importlib.metadata import version; print(version({PYTHON[client][1]!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def table(found: list[dict], versions: dict[str, str]) -> str:
    """Markdown: a row a feature, a column a client, and beneath it why something is refused or is not there."""
    names = {client: heading for client, (heading, _) in {**PYTHON, **NODE}.items()}
    clients = [client for client in names if client in versions]
    features = list(dict.fromkeys(line["feature"] for line in found))
    cells = {(line["client"], line["feature"]): line for line in found}
    shown = {"works": "works", "refused": "refused", "none": "–", "failed": "**fails**"}
    rows = ["| | " + " | ".join(f"{names[c]} {versions[c]}" for c in clients) + " |", "|---" * (len(clients) + 1) + "|"]
    whys: dict[tuple[str, str], list[str]] = defaultdict(list)
    missing: dict[tuple[str, str], list[str]] = defaultdict(list)
    for feature in features:
        row = [feature]
        for client in clients:
            line = cells.get((client, feature), {"outcome": "failed", "why": "did not come to it"})
            row.append(shown[line["outcome"]])
            if line["outcome"] in ("refused", "failed"):
                whys[feature, line["why"].partition(": ")[2] or line["why"]].append(names[client])
            elif line["outcome"] == "none":
                missing[names[client], line["why"]].append(feature)
        rows.append("| " + " | ".join(row) + " |")
    why = [f"- *{feature}*, {', '.join(who)}: {words}" for (feature, words), who in sorted(whys.items())]
    why += [f"- –, {name}: {words} ({', '.join(where)})" for (name, words), where in missing.items()]
    return "\n".join([*rows, "", *why]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clients", nargs="*", help=f"of {', '.join({**PYTHON, **NODE})} (default: all)")
    parser.add_argument("--python", type=Path, default=ENVIRONMENT / "bin/python", help="that has the clients")
    parser.add_argument("--node", type=Path, default=ENVIRONMENT / "node", help="folder with node_modules")
    parser.add_argument("--write", action="store_true", help="put the table into docs/SERVING.md")
    arguments = parser.parse_args()
    clients = arguments.clients or [*PYTHON, *NODE]
    folder = Path(tempfile.mkdtemp(prefix="clients-"))
    sgt = load_agent(with_chat_template(write_trunk(folder / "base", "llama")), folder)
    model, found = Scripted(), []
    app = create_app(Settings("http://upstream"), sgt, httpx.MockTransport(model))
    with running(app) as url, running(sayer(model)) as say:
        for client in clients:
            for line in results(client, url + "/v1", say + "/say", arguments.python, arguments.node):
                found.append(line)
                print(
                    f"{line['client']:<14} {line['feature']:<18} {line['outcome']:<8} {line['why'][:300]}", flush=True
                )
    versions = {client: version(client, arguments.python, arguments.node) for client in clients}
    text = table(found, versions)
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2])
    else:
        print(text)
    return int(any(line["outcome"] == "failed" for line in found))


if __name__ == "__main__":
    sys.exit(main())
