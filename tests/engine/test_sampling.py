"""The choice of a token follows the distribution and never leaves the nucleus."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from ropool.engine import Request, SamplingParams, sampling
from ropool.engine.sampling import sample


def requests(count: int, **params: float) -> list[Request]:
    return [Request(n, [0], SamplingParams(seed=n, **params)) for n in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3)])
def test_frequencies(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0, 0.0])
    count = 4000
    probabilities = torch.softmax(logits / temperature, -1)
    ordered, tokens = probabilities.sort(descending=True)
    kept = tokens[ordered.cumsum(-1) - ordered < top_p]
    expected = torch.zeros(6)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    chosen = sample(logits.expand(count, 6), requests(count, temperature=temperature, top_p=top_p))
    observed = torch.bincount(torch.tensor(chosen), minlength=6) / count
    assert not observed[expected == 0].any()
    # Four standard deviations.
    assert ((observed - expected).abs() < 4 * (expected / count).sqrt() + 1e-9).all()


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    logits = torch.randn(3, 50)
    mixed = [
        Request(0, [0], SamplingParams()),
        Request(1, [0], SamplingParams(temperature=1.0, seed=3)),
        Request(2, [0], SamplingParams()),
    ]
    alone = sample(logits[1:2], [Request(1, [0], SamplingParams(temperature=1.0, seed=3))])
    best = logits.argmax(-1).tolist()
    assert sample(logits, mixed) == [best[0], alone[0], best[2]]


@pytest.mark.parametrize(
    "params",
    [{"temperature": 1e-30}, {"temperature": 1, "top_p": 1e-9}, {"temperature": 1, "top_p": 1e-46}],
)
def test_extremes_are_greedy(params: dict[str, float]) -> None:
    logits = 1000 * torch.randn(20, 50)
    assert sample(logits, requests(20, **params)) == logits.argmax(-1).tolist()


def test_a_row_of_nan_leaves_the_others_alone() -> None:
    logits = torch.randn(2, 50)
    expected = sample(logits, requests(2, temperature=1.0))
    logits[0] = torch.nan
    chosen = sample(logits, requests(2, temperature=1.0))
    assert chosen[1] == expected[1] and 0 <= chosen[0] < 50


def test_a_step_that_fails_costs_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = requests(2, temperature=1.0)
    logits = torch.randn(2, 50)
    expected = sample(logits, requests(2, temperature=1.0))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lost"):
        patch.setattr(sampling, "_invert", Mock(side_effect=RuntimeError("the device is lost")))
        sample(logits, pair)
    assert sample(logits, pair) == expected
    pair[0].tokens.append(expected[0])
    assert pair[0].draw() != requests(1)[0].draw()
