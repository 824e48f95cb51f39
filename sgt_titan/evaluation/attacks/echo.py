"""Echo: let the trunk itself read. It was trained to make sense of embeddings, and an SGT is trained to let it.

    echo            the prompt with a clean request to repeat it; the greedy answer, aligned position by position
    logit_reading   the trunk's own hidden states at the prompt's positions, read with its embedding table

A small trunk cannot follow a request; a large one can, so a low number here says little about a large one.

Legend: N hidden tokens flat, T positions of a row, V vocabulary, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sgt_titan.evaluation.attacks.known_plaintext import fit
from sgt_titan.evaluation.attacks.nearest import GUESSES, top_rows
from sgt_titan.evaluation.world.granted import observe
from sgt_titan.evaluation.world.samples import generator
from sgt_titan.evaluation.world.threat import (
    UNKNOWN,
    Corpus,
    Cost,
    Guess,
    Observation,
    Seed,
    Size,
    Table,
    Transform,
    Trunk,
)

ALONE = 0.3  # of a step of prompts side by side that one of a single prompt takes


@torch.no_grad()
def echo(observation: Observation, trunk: Trunk, *, suffix_ids: Sequence[int] = ()) -> Guess:
    """The prompt, the clean tokens ``suffix_ids`` ("Repeat the text above:"), then the trunk's greedy answer.

    Read in order as the prompt's tokens. Without a suffix the trunk simply goes on, which is the floor.
    """
    model: Any = trunk.model  # generates, which its type does not say
    guesses = []
    embed = model.get_input_embeddings()
    suffix_SD = embed(torch.tensor(list(suffix_ids), dtype=torch.int64, device=model.device))
    flops = 0.0
    for x_TD, hidden_T in zip(observation.x_tilde, observation.hidden, strict=True):
        wanted, T = int(hidden_T.sum()), len(hidden_T)
        first = int(hidden_T.nonzero()[0, 0]) if wanted else 0
        sent_1TD = torch.cat([x_TD.to(suffix_SD.dtype), suffix_SD])[None]
        room = (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - sent_1TD.shape[1]
        asked = max(0, min(T - first, room))
        out = model.generate(
            inputs_embeds=sent_1TD,
            attention_mask=torch.ones(sent_1TD.shape[:2], dtype=torch.int64, device=model.device),
            max_new_tokens=asked,
            do_sample=False,
            pad_token_id=0,
        )[0].cpu() if asked else torch.empty(0, dtype=torch.int64)  # fmt: skip
        said_T = torch.full((T,), UNKNOWN)
        said_T[first : first + len(out)] = out[: T - first]
        guesses.append(said_T[hidden_T])
        flops += 2.0 * sum(p.numel() for p in model.parameters()) * (sent_1TD.shape[1] + asked)
    return Guess(torch.cat(guesses)[:, None], flops=flops)


@torch.no_grad()
def logit_reading(
    observation: Observation,
    trunk: Trunk,
    table: Table,
    transform: Transform,
    corpus: Corpus,
    seed: Seed,
    *,
    rows: int = 64,
) -> Guess:
    """The hidden state at each position and layer, mapped to the table by a regression on the attacker's own rows.

    The server computes these states anyway. Layer 0 is the obfuscation itself; the layer that reads the attacker's
    held-out rows best is taken. A linear map for each layer, so this is the weakest of learned readers.
    """
    own = observe(corpus.rows[:rows], transform.mechanism, trunk.model, generator(seed.value + 1, trunk.model.device))
    truth_M = torch.cat([torch.from_numpy(row.ids[row.obfuscate]) for row in corpus.rows[:rows]])
    split = int(0.8 * len(truth_M))
    mine, theirs = hidden_states(trunk, own), hidden_states(trunk, observation)
    best, best_top, best_layer = -1.0, torch.empty(0, GUESSES, dtype=torch.int64), 0
    clean_MD = table.rows_VD[truth_M.to(table.rows_VD.device)]
    for layer, (mine_MD, theirs_ND) in enumerate(zip(mine, theirs, strict=True)):
        inverse = fit(mine_MD[:split], clean_MD[:split])
        read_M = top_rows(inverse(mine_MD[split:]), table.rows_VD, 1)[:, 0].cpu()
        share = (read_M == truth_M[split:]).double().mean().item()
        if share > best:
            best, best_top, best_layer = share, top_rows(inverse(theirs_ND), table.rows_VD, GUESSES).cpu(), layer
    parameters = sum(p.numel() for p in trunk.model.parameters())
    tokens = sum(map(len, own.hidden)) + sum(map(len, observation.hidden))
    note = f"read after layer {best_layer} of {len(mine) - 1}, the best of all on the attacker's own rows ({best:.1%})"
    return Guess(best_top, flops=2.0 * parameters * tokens, notes=(note,))


def hidden_states(trunk: Trunk, observation: Observation) -> list[torch.Tensor]:
    """States at the hidden positions after each layer, layer 0 the input: L + 1 tensors (N, D) float32 on the CPU."""
    found: list[list[torch.Tensor]] = []
    for x_TD, hidden_T in zip(observation.x_tilde, observation.hidden, strict=True):
        out = trunk.model(
            inputs_embeds=x_TD[None].to(trunk.model.dtype), output_hidden_states=True, use_cache=False, logits_to_keep=1
        )
        found.append([state[0][hidden_T.to(state.device)].float() for state in out.hidden_states])
    return [torch.cat(layer) for layer in zip(*found, strict=True)]


def cost(size: Size, *, rows: int = 0, suffix_ids: Sequence[int] = ()) -> Cost:
    tokens = (size.rows + rows) * size.longest + (0 if rows else size.tokens)
    layers = 32  # of a large trunk; the size does not say
    flops = 2.0 * tokens * size.trunk + 4.0 * size.vocab * size.width * (size.tokens + 200 * rows)
    memory = 4.0 * layers * tokens * size.width + 24.0 * 1024 * min(size.vocab, 8192)
    return Cost(flops, memory, steps=0.0 if rows else ALONE * size.tokens)
