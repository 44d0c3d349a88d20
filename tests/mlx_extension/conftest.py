"""Where `ROPOOL_REQUIRE_BACKENDS` names `metal`, the extension must be there; elsewhere its tests
are skipped without it."""

from __future__ import annotations

from ops.backend import required_backends

if "metal" in required_backends():
    import ropool_metal  # noqa: F401
