"""The layout of a call: what was measured for it on a device of its name, or else a default that
names no threshold.

A call whose threads the GPU holds all at once is bound by latency: its blocks are small, and it
prefetches before the previous kernel has ended. A larger one is bound by bandwidth. Where one turns
into the other is a matter of the device, so it stands in the device's tuning table.
"""

from __future__ import annotations

from typing import Any

from ropool.backends.cuda.grid import threads_per_token
from ropool.backends.cuda.shape import Shape, checked, possible, row_bytes, why_not_bulk
from ropool.backends.cuda.specialise import SIZES, Call
from ropool.dispatch import tuning


def shape_of(call: Call, arch: str, processors: int, device: str) -> Shape:
    """The layout for a call on a GPU of `arch` (such as `sm_90`) with so many multiprocessors that
    calls itself `device`."""
    dependent = int(arch.removeprefix("sm_").rstrip("af")) >= 90
    choice = tuning.choice_of("cuda", device, call.key, call.tokens)
    if choice is None:
        choice = _by_rules(call, processors, tuning.table_of("cuda", device).rules)
    shape = checked(choice)._replace(dependent=dependent)
    return possible(shape, call)


def check_tuning(table: tuning.Table) -> None:
    """Raise `ValueError` for a choice that no kernel has, or for rules that `_by_rules` does not
    know."""
    for choices in table.entries.values():
        for choice in choices.values():
            checked(choice)
    rules = table.rules
    for name in ("early_turned", "joined"):
        for choice, held in rules.get(name, ()):
            checked(choice)
            _whole(name, held)
    checked({"loads": rules.get("loads", "plain")})
    for name in ("short_row_bytes", "early_copied"):
        _whole(name, rules.get(name, 0))
    bulk = rules.get("bulk")
    if bulk is not None:
        for name in ("tokens", "rows", "early_bytes"):
            _whole(f"bulk: {name}", bulk[name])
        checked({"bulk": True, "threads": bulk["rows"]})


def _whole(name: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"rule {name} is {value!r}; allowed: whole numbers")


def _by_rules(call: Call, processors: int, rules: dict[str, Any]) -> tuning.Choice:
    """What holds for calls without an entry of their own. The rules of a table count threads and
    tokens a multiprocessor, so that they follow the size of the call: threads with the longest
    vectors, whatever the rule's own are."""
    if call.key.rotary_dim:
        for choice, held in rules.get("early_turned", ()):
            threads = call.tokens * threads_per_token(call, checked(choice))
            if threads <= processors * held:
                return dict(choice)
        short = call.key.head_dim * SIZES[call.formats["Model"]] <= rules.get("short_row_bytes", 0)
        return {"q_rows": 1 if short else 2, "loads": rules.get("loads", "plain")}
    if call.integers.get("JOINED"):
        for choice, tokens in rules.get("joined", ()):
            if call.tokens <= tokens * processors:
                return dict(choice)
        return {}
    bulk = rules.get("bulk")
    if bulk is not None and call.tokens >= bulk["tokens"] * processors:
        rows = bulk["rows"]
        if why_not_bulk(call, rows) is None:
            early = call.tokens * row_bytes(call) <= bulk["early_bytes"]
            return {"bulk": True, "threads": rows, "early": early}
    threads = 64 if rules and call.tokens <= processors else 128
    held = call.tokens * threads_per_token(call, Shape(threads=threads))
    if held <= processors * rules.get("early_copied", 0):
        return {"threads": threads, "early": True}
    return {"threads": threads, "loads": rules.get("loads", "plain")}
