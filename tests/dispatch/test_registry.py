"""The registry: records are metadata, equal ones may come twice, different ones may not."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import ropool
from ropool.backends.reference import ops as reference
from ropool.dispatch import OPS, KernelSpec, backends, kernels, register, register_backend
from ropool.dispatch.spec import load


def test_registering_an_equal_record_again_does_nothing() -> None:
    for op in OPS:
        before = kernels(op)
        for spec in before:
            register(dataclasses.replace(spec))
        assert kernels(op) == before
    before_backends = backends()
    for backend in before_backends:
        register_backend(dataclasses.replace(backend))
    assert backends() == before_backends


def test_a_different_record_of_the_same_kernel_is_refused() -> None:
    spec = kernels("rope_")[0]
    with pytest.raises(ValueError, match=f"{spec.label} of rope_ is registered already"):
        register(dataclasses.replace(spec, priority=spec.priority + 1))
    assert kernels("rope_")[0] is spec
    with pytest.raises(ValueError, match=f"backend {spec.backend!r} is registered already"):
        register_backend(dataclasses.replace(backends()[0], name=spec.backend, available="a:b"))


@pytest.mark.parametrize(("field", "value"), [("op", "rope"), ("backend", "abacus")])
def test_a_record_of_an_unknown_op_or_backend_is_refused(field: str, value: str) -> None:
    spec = KernelSpec("rope_", "k", "reference", "a:b", ("cpu",), "a:b")
    with pytest.raises(ValueError, match=f"{value}.*known:|unknown backend; known:"):
        register(dataclasses.replace(spec, **{field: value}))


def test_every_op_has_a_reference_with_the_signature_of_the_public_function() -> None:
    for op in OPS:
        public = inspect.signature(getattr(ropool, op))
        assert inspect.signature(getattr(reference, op)).parameters == public.parameters, op
        assert any(spec.backend == "reference" for spec in kernels(op))


def test_every_record_names_something_that_exists() -> None:
    for op in OPS:
        for spec in kernels(op):
            assert callable(load(spec.supports))
            if ropool.dispatch.unavailable(spec.backend) is None:
                assert callable(load(spec.target))


def test_importing_the_package_imports_no_backend() -> None:
    code = (
        "import sys, ropool; "
        "print(*[m for m in sys.modules if m.startswith('ropool.backends') or m == 'ropool._cpu'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
