"""What the tests of the engine share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ropool.engine import Request
from ropool.engine import engine as engine_module
from ropool.engine.sampling import sample


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """For models this small: threads that wait for each other on busy cores cost ten times the
    work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's models are: on the CPU, and once more on the GPU if there is one."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def logits_of(monkeypatch: pytest.MonkeyPatch) -> dict[Request, list[Tensor]]:
    """Filled with the logits from which each token of each request was chosen."""
    seen: dict[Request, list[Tensor]] = defaultdict(list)

    def spy(logits: Tensor, requests: Sequence[Request]) -> list[int]:
        for row, request in zip(logits, requests, strict=True):
            seen[request].append(row.clone())
        return sample(logits, requests)

    monkeypatch.setattr(engine_module, "sample", spy)
    return seen
