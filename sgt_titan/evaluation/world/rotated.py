"""A mechanism in a secret basis: what a client of ``sgt-titan conjformer convert`` sends, alone or around an SGT.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from sgt_titan.conjformer.client import Client
from sgt_titan.conjformer.mark import require_original, require_same_secret
from sgt_titan.conjformer.secret import load as load_secret
from sgt_titan.errors import UserError
from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated, Rotation
from sgt_titan.evaluation.world.samples import Padded, load_trunk
from sgt_titan.transform.trunk_files import EMBEDDING, TrunkFiles
from sgt_titan.trunk.files import CONFIG, read_json


class Answering:
    """Server and client together, called like a causal language model: rotated embeddings to logits and answers."""

    def __init__(self, server: PreTrainedModel, client: Client):
        self.server, self.client = server, client
        self.dtype, self.device = server.dtype, server.device

    def __call__(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        out = self.server(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        return SimpleNamespace(logits=self.client.decode(out.logits))


def load_rotation(
    before: Mechanism, server: str | Path, client: str | Path, secret: str | Path, public: str | Path,
    *, wire: torch.dtype = torch.float32, name: str = "", title: str = "", own: bool = False,
) -> Mechanism:  # fmt: skip
    """``before``, then the secret basis.

    Args:
        public: the checkpoint that the server's was made from, as the world knows it. With ``own`` one that the
            attacker made himself the same way, which need not be the original.
        wire: type in which embeddings are sent.

    Raises:
        UserError: files that are not a conversion's; a family that adds positions to its embeddings.
    """
    found = Client.load(client, load_secret(Path(secret)))
    if found.positions_TD is not None:
        raise UserError(f"{client}: positions are added to these embeddings, which the attacks here do not know of")
    files, original = TrunkFiles(server), TrunkFiles(public)
    require_same_secret(server, read_json(files.path / CONFIG), load_secret(Path(secret)).name)
    if not own:
        require_original(public, read_json(original.path / CONFIG))
    width = files.entries[EMBEDDING].shape[1] if EMBEDDING in files else None
    if width != found.U_DD.shape[0]:
        raise UserError(f"{server}: is not the server of {client} (their widths differ)")
    answer = Answering(load_trunk(server, torch.device("cpu"), embeds=False), found)
    return rotate(before, answer, files, original, wire=wire, name=name, title=title)


def rotate(
    before: Mechanism, answer: Answering, served: TrunkFiles, public: TrunkFiles,
    *, wire: torch.dtype = torch.float32, name: str = "", title: str = "",
) -> Mechanism:  # fmt: skip
    """The mechanism; all positions are rotated, clean ones too, since the server embeds nothing."""

    def obfuscate(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> Obfuscated:
        # The client's own table: it is not the trunk's where the model was fine-tuned in private.
        sent = before.obfuscate(batch, answer.client.embed(batch.tokens_BT), random)
        turned_BTD, center_BTD = (answer.client.rotate(t.float()) for t in (sent.x_tilde_BTD, sent.center_BTD))
        # In this basis the noise is no longer independent by feature; what it hides is measured before the rotation.
        return Obfuscated(turned_BTD.to(wire).float(), center_BTD, None)

    rotation = Rotation(before, served, public, answer)
    plain = before.name == "none"
    return Mechanism(
        name or ("rotated" if plain else f"{before.name}_rotated"),
        title or ("a secret rotation" if plain else f"{before.title}, then a secret rotation"),
        obfuscate,
        transform=before.transform,
        rotation=rotation,
        std=before.std,
        facts=dict(before.facts),
    )
