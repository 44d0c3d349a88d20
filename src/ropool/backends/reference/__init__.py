"""The ops in plain torch: what each op means, in a form that can be read and that runs on every
device.

It is neither fast nor the oracle of itself; the tests compare it with float64.
"""

from __future__ import annotations

from ropool.dispatch.key import Key
from ropool.dispatch.spec import Device


def available() -> None:
    """Plain torch is always there."""


def supports(key: Key, device: Device) -> None:
    """Every call that validation lets through is covered."""
