"""Hypothesis profiles, and the fixture that runs a test on every backend."""

from __future__ import annotations

import os

import hypothesis
import pytest

from ops.backend import BACKENDS, Backend, require

# The same examples in every run. HYPOTHESIS_PROFILE=fuzz looks for new ones.
hypothesis.settings.register_profile("ci", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    require(chosen)
    return chosen
