"""A tuning table and its JSON text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ropool.dispatch.key import Key

FORMAT = 1
MOST_TOKENS = 1 << 40
Choice = Mapping[str, Any]
"""How a kernel is laid out, in the words of its backend."""
Subject = tuple[tuple[str, Any], ...]
"""The fields of a key that a table is indexed by, those at their default left out."""

_FIELDS = (
    *("op", "heads_q", "heads_kv", "head_dim", "v_head_dim", "latent_dim", "rotary_dim", "write_k"),
    *("model_bytes", "pool_bytes", "q_out_bytes", "packed_row", "norm"),
)
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BYTES |= dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1)


def subject(key: Key) -> Subject:
    """What of `key` decides how much work a token is. Formats of one width share an entry; so do
    layouts, pairings and index dtypes, which change an address or a permutation, not the bytes."""
    found: dict[str, Any] = {name: getattr(key, name) for name in _FIELDS[:8]}
    found |= {
        "model_bytes": _BYTES[key.dtype],
        "pool_bytes": _BYTES.get(key.pool_dtype or ""),
        "q_out_bytes": _BYTES.get(key.q_out_dtype or ""),
        "packed_row": key.row_format == "fp8_ds_mla",
        "norm": key.q_norm_dtype is not None or key.k_norm_dtype is not None,
    }
    return tuple((name, value) for name, value in found.items() if value not in (None, 0, False))


@dataclass(slots=True)
class Table:
    """What was measured for `backend` on devices that call themselves `device`.

    `entries` maps a subject to choices by the number of tokens that they were measured with;
    `rules` is what the backend does for subjects without an entry, in its own words.
    `measured_with` names versions.
    """

    backend: str
    device: str
    measured_with: dict[str, str] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    entries: dict[Subject, dict[int, Choice]] = field(default_factory=dict)

    def choice(self, key: Key, tokens: int) -> Choice | None:
        """The choice that was measured with the number of tokens nearest in ratio to `tokens`."""
        choices = self.entries.get(subject(key))
        if not choices:
            return None
        return choices[min(choices, key=lambda count: (abs(math.log(count / tokens)), count))]

    def update(self, other: Table) -> None:
        """Take over what `other` holds; it goes before what is here."""
        self.measured_with |= other.measured_with
        self.rules |= other.rules
        for what, choices in other.entries.items():
            self.entries[what] = self.entries.get(what, {}) | choices


def file_name(backend: str, device: str) -> str:
    """The name of a table's file, such as `cuda-nvidia-h200.json`."""
    return f"{backend}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def parse(text: str | bytes, source: str) -> Table:
    """The table in the JSON `text` that comes from `source`. Raises `ValueError` for a text that is
    no table."""
    try:
        content = json.loads(text if isinstance(text, str) else text.decode())
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']}, this version reads {FORMAT}")
        table = Table(content["backend"], content["device"])
        table.measured_with = dict(content.get("measured_with", {}))
        table.rules = dict(content.get("rules", {}))
        for entry in content.get("entries", []):
            choices: dict[int, Choice] = {
                int(tokens): dict(choice) for tokens, choice in entry["choices"].items()
            }
            if any(not 1 <= tokens <= MOST_TOKENS for tokens in choices):
                raise ValueError(f"a number of tokens is not within 1 to {MOST_TOKENS}")
            table.entries[tuple((n, entry[n]) for n in _FIELDS if n in entry)] = choices
        return table
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{source} is no tuning table ({type(error).__name__}: {error})"
        ) from error


def dump(table: Table) -> str:
    """The JSON text of a table, a line for each entry."""
    head = {"format": FORMAT, "backend": table.backend, "device": table.device}
    head |= {"measured_with": table.measured_with, "rules": table.rules}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    entries = [
        "  " + json.dumps(dict(what) | {"choices": {str(t): choices[t] for t in sorted(choices)}})
        for what, choices in sorted(table.entries.items(), key=repr)
    ]
    listed = ",\n".join(entries)
    return "{\n" + ",\n".join(lines) + f',\n "entries": [\n{listed}\n ]\n}}\n'
