"""Picks cases so that every two values of different parameters meet in at least one case."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(parameters: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Greedy: each case starts from a pair not met yet, then takes the values that meet most."""
    rng = random.Random(seed)
    names = list(parameters)
    index = {name: i for i, name in enumerate(names)}
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(parameters[a]))
        for y in range(len(parameters[b]))
    }
    cases = []
    while missing:
        chosen = dict(min(missing))
        for name in rng.sample(names, len(names)):
            if name not in chosen:
                gains = [
                    (
                        sum(
                            _pair(index, (name, value), other) in missing
                            for other in chosen.items()
                        ),
                        rng.random(),
                        value,
                    )
                    for value in range(len(parameters[name]))
                ]
                chosen[name] = max(gains)[2]
        missing -= {_pair(index, *two) for two in itertools.combinations(chosen.items(), 2)}
        cases.append({name: parameters[name][chosen[name]] for name in names})
    return cases


def _pair(index: Mapping[str, int], a: tuple[str, int], b: tuple[str, int]) -> Any:
    return (a, b) if index[a[0]] < index[b[0]] else (b, a)
