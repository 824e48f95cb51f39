"""Token dropping: some of a prompt's tokens are sent in clear, the others are left out. What a transform has to beat.

The simplest way to trade a prompt's worth for privacy: who reads it gets exactly the share that is sent, and whatever
can be guessed from it. In the place of a token that is left out stands the best constant there is (zero.py), which
serves the trunk better than a hole. Which tokens are sent is decided at random, or by a ridge regression that has seen
the prompt alone: from the trunk's hidden states to what the answer would lose without the token, to first order.

Legend: B rows, T positions, D width, F features of a token, N hidden tokens flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from sgt_titan.evaluation.attacks.known_plaintext import Affine, fit
from sgt_titan.evaluation.scores.utility import response_logits
from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated
from sgt_titan.evaluation.world.samples import Padded

Place = Callable[[Padded, torch.Tensor], torch.Tensor]  # the constant at the hidden positions of a batch's embeddings
Choose = Callable[
    [Padded, torch.Tensor, torch.Generator], torch.Tensor
]  # the larger (B, T), the sooner a token is sent


def dropping(share: float, place: Place, choose: Choose, *, name: str, title: str) -> Mechanism:
    """Of each prompt's hidden tokens the ``share`` that ``choose`` puts first is sent in clear, rounded up."""

    def obfuscate(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> Obfuscated:
        sent_BT = first(choose(batch, x_BTD, random), batch.obfuscate_BT, share)
        sent_BTD = torch.where((batch.obfuscate_BT & ~sent_BT)[..., None], place(batch, x_BTD).to(x_BTD), x_BTD)
        return Obfuscated(sent_BTD, sent_BTD, None)

    mechanism = Mechanism(name, title, obfuscate, drops=True)
    mechanism.facts["share"] = share
    return mechanism


def first(score_BT: torch.Tensor, hidden_BT: torch.Tensor, share: float) -> torch.Tensor:
    """bool (B, T): of each row's hidden positions the ``share`` of highest score, rounded up."""
    rank_BT = score_BT.masked_fill(~hidden_BT, -torch.inf).argsort(-1, descending=True).argsort(-1)
    return hidden_BT & (rank_BT < (share * hidden_BT.sum(-1, keepdim=True)).ceil())


def at_random(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Any token as soon as any other."""
    return torch.rand(batch.tokens_BT.shape, generator=random, device=x_BTD.device)


def learned_choice(trunk: PreTrainedModel, batches: Sequence[Padded], place: Place) -> Choose:
    """A choice that sees the prompt alone, fitted on ``batches`` with their responses.

    The target of a hidden token is what the response's log-likelihood loses to first order if the constant stands there
    instead, the gradient taken half-way between the two.
    """
    features, losses = [], []
    for batch in batches:
        x_BTD = trunk.get_input_embeddings()(batch.tokens_BT).detach()
        hidden_BT = batch.obfuscate_BT & ~(batch.target_BT.cumsum(-1) > 0)
        step_BTD = torch.where(hidden_BT[..., None], place(batch, x_BTD).to(x_BTD) - x_BTD, 0.0)
        with torch.enable_grad():  # fitted when the first prompt is sent, where nothing else needs gradients
            middle_BTD = (x_BTD + 0.5 * step_BTD).requires_grad_(True)
            logits_NV = response_logits(trunk, batch, middle_BTD)
            nats = torch.nn.functional.cross_entropy(logits_NV, batch.tokens_BT[batch.target_BT], reduction="sum")
            (slope_BTD,) = torch.autograd.grad(nats, middle_BTD)
        losses.append((slope_BTD * step_BTD).sum(-1)[hidden_BT])
        features.append(_features(trunk, batch)[hidden_BT])
    affine: Affine = fit(torch.cat(features), torch.cat(losses)[:, None])

    def choose(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        states_BTF = _features(trunk, batch)
        return affine(states_BTF.flatten(0, 1))[:, 0].view(states_BTF.shape[:2])

    return choose


@torch.no_grad()
def _features(trunk: PreTrainedModel, batch: Padded) -> torch.Tensor:
    """The trunk's embeddings, its middle and its last hidden states, each normalised, (B, T, F): causal."""
    states = trunk(
        input_ids=batch.tokens_BT,
        attention_mask=batch.valid_BT.long(),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    chosen = (states[0], states[len(states) // 2], states[-1])
    return torch.cat([torch.nn.functional.layer_norm(s.float(), s.shape[-1:]) for s in chosen], -1)
