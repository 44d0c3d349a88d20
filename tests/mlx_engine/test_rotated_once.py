"""A layer that rotates and stores the keys of one step twice is found with checks on, with the
kernels and without."""

from __future__ import annotations

from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
from mlx_extension.device import use_device  # noqa: E402

use_device()

import mlx.nn as mx_nn  # noqa: E402

from mlx_engine import tiny  # noqa: E402
from mlx_engine.test_families import PARAMS, SETTINGS, pooled  # noqa: E402
from ropool.dispatch.settings import override  # noqa: E402
from ropool.mlx.engine import MlxEngine  # noqa: E402


class Twice(mx_nn.Module):  # type: ignore[misc]
    """Attention that is called a second time, as by a model which rotates by itself too."""

    def __init__(self, once: Any) -> None:
        super().__init__()
        self.once = once

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.once(*args, **options)
        return self.once(*args, **options)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("twice", [False, True])
def test_rotated_once(twice: bool, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPOOL_MLX_CUSTOM_ROPE", setting)
    ours = pooled(tiny.build("llama"))
    engine = MlxEngine(ours, pool_tokens=64)
    if twice:
        layer = ours._model.layers[1]
        layer.self_attn = Twice(layer.self_attn)
    with override(check=True):
        if twice:
            said = "layer 1 has called rope_store_kv_ on its K in this step, and now rope_store_kv_"
            with pytest.raises(RuntimeError, match=said):
                engine.generate([[1, 2, 3]], PARAMS)
        else:
            engine.generate([[1, 2, 3]], PARAMS)
