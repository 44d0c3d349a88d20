"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ropool.engine.request import Request

_LEAST_TOP_P = torch.finfo(torch.float32).tiny
"""Less would be 0 in float32, and the nucleus empty."""


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each request from its row of `logits` `[N, vocab]` float32.

    A random choice inverts the cumulative distribution at one number that the request's own
    generator draws, so it is the same in every batch. Waits for the device, once a step.
    """
    chosen: list[int] = logits.argmax(-1).tolist()
    rows = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if rows:
        params = [requests[row].params for row in rows]
        draws = [requests[row].draw() for row in rows]
        drawn = _invert(
            logits[torch.tensor(rows, device=logits.device)],
            torch.tensor([[max(p.temperature, 1e-6)] for p in params], device=logits.device),
            torch.tensor([[max(p.top_p, _LEAST_TOP_P)] for p in params], device=logits.device),
            torch.tensor([[draw] for draw in draws], device=logits.device),
        )
        for row, token in zip(rows, drawn.tolist(), strict=True):
            chosen[row] = token
    return chosen


def _invert(logits: Tensor, temperature: Tensor, top_p: Tensor, draw: Tensor) -> Tensor:
    """The token at `draw` (0 to 1) of the nucleus: the fewest most likely tokens whose
    probabilities add up to `top_p` (arXiv:1904.09751)."""
    # The largest logit is subtracted first, so that a tiny temperature does not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities, tokens = torch.softmax(scaled, -1).sort(stable=True, dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    nucleus = probabilities.masked_fill(before >= top_p, 0.0).cumsum(-1)
    place = torch.searchsorted(nucleus, draw * nucleus[:, -1:], right=True)
    # Rounding can put the draw at the very end: the last token that is in the nucleus.
    # Of a row of NaN no token is: the first one then, so that the other rows get theirs.
    last = ((before < top_p).sum(-1, keepdim=True) - 1).clamp(min=0)
    return tokens.gather(-1, torch.minimum(place, last))[:, 0]
