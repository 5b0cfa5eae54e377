# SPDX-License-Identifier: MIT
"""What routers are tuned for besides the text: that a token chooses experts which the tokens before it have chosen.

Formulas are of ReMoE (arXiv 2605.27081), but for `residents`: the paper rewards the experts of the token before (its
`L_reuse`), which is a cache of one token's experts. Here they are those of a least recently used cache of any number.

In all shapes, s is sequences, t tokens, e the layer's experts and k those that a token uses. Needs torch.
"""

from __future__ import annotations

import torch

_EPSILON = 1e-8  # of the paper, within its logarithm


def log_probabilities(logits: torch.Tensor, *, is_sigmoid: bool) -> torch.Tensor:
    """Logarithm of the router's distribution over experts [..., e]: softmax, or sigmoids divided by their sum."""
    if not is_sigmoid:
        return torch.log_softmax(logits, dim=-1)
    scores = torch.nn.functional.logsigmoid(logits)
    return scores - torch.logsumexp(scores, dim=-1, keepdim=True)


def residents(chosen: torch.Tensor, n_experts: int, n_slots: int) -> torch.Tensor:
    """Which experts a least recently used cache holds when a token arrives, from an empty one: bool [s, t, e].

    Args:
        chosen: int64 [s, t, k], the experts of each token; what it chose is the latest used, lower numbers later.
        n_experts: e.
        n_slots: experts that the cache holds, at least k. With k, they are the experts of the token before.
    """
    n_tokens = chosen.shape[1]
    used = torch.zeros(*chosen.shape[:2], n_experts, dtype=torch.bool).scatter_(-1, chosen, True)
    token = torch.arange(1, n_tokens + 1).view(1, -1, 1)
    last = torch.where(used, token, 0).cummax(dim=1).values  # 0: not yet used
    before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], dim=1)
    order = before * n_experts + torch.arange(n_experts - 1, -1, -1)
    held = torch.zeros_like(used).scatter_(-1, order.topk(min(n_slots, n_experts), dim=-1).indices, True)
    return held & (before > 0)


def reuse_loss(log_p: torch.Tensor, held: torch.Tensor, n_used: int) -> torch.Tensor:
    """`-log(mean_t m_t + 1e-8)` with `m_t = 1/k sum of P_t over the experts held`, over all tokens but the first.

    Args:
        log_p: [s, t, e], of the router that is tuned.
        held: bool [s, t, e], see `residents`; a constant.
        n_used: k.
    """
    mass = torch.where(held, log_p.exp(), 0.0).sum(dim=-1) / n_used
    return -torch.log(mass[:, 1:].mean() + _EPSILON)


def anchor_loss(log_p: torch.Tensor, log_reference: torch.Tensor) -> torch.Tensor:
    """`KL(P || P_ref)` in nats, mean over tokens: how far a router is from the original one on the same input."""
    return (log_p.exp() * (log_p - log_reference)).sum(dim=-1).mean()


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`KL(teacher || student)` of the next token in nats, mean over tokens (Router KD, arXiv 2603.02217), at the
    temperature 1; logits [s, t, vocabulary]."""
    return torch.nn.functional.kl_div(
        torch.log_softmax(logits, dim=-1).flatten(0, 1),
        torch.log_softmax(teacher, dim=-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )


def overlap(chosen: torch.Tensor) -> float:
    """Share of a token's experts that the token before had chosen too (the paper's EOR); chosen [s, t, k]."""
    same = chosen[:, 1:, :, None] == chosen[:, :-1, None, :]
    return float(same.any(dim=-1).double().mean())
