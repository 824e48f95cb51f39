"""What the tests of client and proxy share: a small export of a small trunk, with a chat template and fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sgt_titan.transform import ExportedTransform, SGTConfig, estimator_config, table_statistics, write_export
from tests.stub_servers import Trunk

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}TOOLS:{{ tools | tojson }};{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# With tools, calls and thoughts.
AGENT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}TOOLS:{{ tools | tojson }}, call as <tool_call>;{% endif %}{% for m in messages %}"
    "<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>\n"
    "{% elif enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
CONTEXT = 128


def with_chat_template(folder: Path, template: str = CHAT_TEMPLATE) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


def make_export(trunk_dir: Path, out: Path, *, std: float = 1.0, mean: float = 0.5, embeddings=True, **fields) -> Path:
    """An untrained transform of ``trunk_dir``, sigma around ``std`` times the table's; std 0: nearly the identity."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trunk = AutoModelForCausalLM.from_pretrained(trunk_dir, dtype=torch.float32)
    table_VD = trunk.get_input_embeddings().weight.detach()
    facts = table_statistics(table_VD)
    config = SGTConfig(
        trunk_config=estimator_config(AutoConfig.from_pretrained(trunk_dir), 2),
        hidden_size=table_VD.shape[1],
        vocab_size=table_VD.shape[0],
        scale=facts.scale,
        median_norm=facts.median_norm,
        std_min=1e-7,
        std_init=std or 1e-6,
        embeddings=embeddings,
        **fields,
    )
    state = {k: v.detach().clone() for k, v in ExportedTransform(config).state_dict().items()}
    torch.manual_seed(3)
    for name, tensor in sorted(state.items()):
        if name != "embed_tokens.weight" and tensor.dim() == 2:
            state[name] = torch.randn(tensor.shape) / tensor.shape[1] ** 0.5
        if "head.weight" in name:
            gain = mean * facts.scale if name.startswith("mean") else 0.1
            state[name] = torch.randn(tensor.shape) * gain / tensor.shape[1] ** 0.5 * bool(std)
    if embeddings:
        state["embed_tokens.weight"] = table_VD.clone()
    else:
        from sgt_titan.transform import fingerprint_tensor

        config.fingerprints = {"embeddings": fingerprint_tensor(table_VD)}
    return write_export(out, config, state, tokenizer_dir=trunk_dir, summary={"name": "small"})


def load_trunk(trunk_dir: Path, **fields) -> Trunk:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trunk_dir, dtype=torch.float32).eval()
    return Trunk(model, AutoTokenizer.from_pretrained(trunk_dir), **{"context": CONTEXT, **fields})


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
def chat_trunk(tmp_path_factory) -> Path:
    """A small random Llama with a byte-level tokenizer and a chat template. Do not change its files."""
    from tests.conftest import write_trunk

    return with_chat_template(write_trunk(tmp_path_factory.mktemp("chat-trunk"), "llama"))


@pytest.fixture(scope="session")
def chat_export(chat_trunk, tmp_path_factory) -> Path:
    """A transform of ``chat_trunk`` that moves and blurs. Do not change its files."""
    return make_export(chat_trunk, tmp_path_factory.mktemp("chat-export") / "export")


def load_agent(chat_trunk: Path, folder: Path):
    """A transform whose template knows tools, loaded; its context is long, since a byte is a token."""
    from sgt_titan.client import StainedGlassTransform as Client

    trunk = with_chat_template(shutil.copytree(chat_trunk, folder / "trunk"), AGENT_TEMPLATE)
    sgt = Client.from_pretrained(make_export(trunk, folder / "export"))
    sgt.config.trunk_config["max_position_embeddings"] = 4096
    return sgt


@pytest.fixture(scope="session")
def agent_sgt(chat_trunk, tmp_path_factory):
    """``load_agent``'s. Do not change it."""
    return load_agent(chat_trunk, tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="session")
def identity_export(chat_trunk, tmp_path_factory) -> Path:
    """A transform that changes nothing that matters: answers must be those to the clean prompt."""
    return make_export(chat_trunk, tmp_path_factory.mktemp("identity") / "export", std=0.0)


@pytest.fixture(scope="module")
def sgt(chat_export):
    from sgt_titan.client import StainedGlassTransform as Client

    return Client.from_pretrained(chat_export)


@pytest.fixture(scope="module")
def trunk(chat_trunk) -> Trunk:
    return load_trunk(chat_trunk)
