"""Reads Hugging Face configs. Every key of a rope dict is either understood or refused: an option
dropped in silence is a model that runs with the wrong frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ropool.rotary import families
from ropool.rotary.config import RotaryConfig
from ropool.rotary.hf_fields import ORIGINAL_LENGTH, Fields, refuse
from ropool.rotary.hf_scaling import read_scaling

# Names of older checkpoints.
_ALIASES = {"su": "longrope", "mrope": "default"}
# Scales of Q by position and leftovers of a config class or a training run: not of the rotation.
_INERT = {"llama_4_scaling_beta", "max_position_embeddings", "finetuned"}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | _INERT
_COMMON |= {"mrope_section", "mrope_interleaved", "interleaved"}
# Of jetmoe and zamba2.
_HEAD_DIM_NAMES = ("kv_channels", "attention_head_dim")
# Of gpt_neox and stablelm.
_PARTIAL_NAMES = ("rotary_pct", "rope_pct")
_LONGROPE = {"short_factor", "long_factor", "short_mscale", "long_mscale"}
_YARN = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
# The keys each type understands besides the common ones. The length has no part in the formulas of
# the first three.
_KEYS: dict[str, set[str]] = {
    "default": {ORIGINAL_LENGTH},
    "linear": {ORIGINAL_LENGTH, "factor"},
    "proportional": {ORIGINAL_LENGTH, "factor"},
    "dynamic": {ORIGINAL_LENGTH, "factor"},
    "yarn": {ORIGINAL_LENGTH, "factor", "attention_factor"} | _YARN,
    "llama3": {ORIGINAL_LENGTH, "factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {ORIGINAL_LENGTH, "factor", "attention_factor"} | _LONGROPE,
}


def read_config(config: object, layer_type: str | None) -> RotaryConfig:
    """The body of `RotaryConfig.from_hf`."""
    fields = Fields(config)
    if (text := fields.get("text_config")) is not None:
        fields = Fields(text)
    model_type = fields.get("model_type", default="")
    if model_type in families.REFUSED:
        refuse(f"model_type is {model_type!r}; ropool cannot: {families.REFUSED[model_type]}")
    rope = _rope_dict(fields, layer_type)
    rope_type = _rope_type(rope)
    head_dim, rotary_dim, factor = _widths(fields, rope, rope_type, layer_type)
    section, mrope_interleaved = _mrope(rope, model_type)
    theta = rope.get("rope_theta")
    if theta is None:
        theta = families.FIXED_THETA.get(model_type)
    if theta is None:
        refuse(
            "rope_theta is missing; allowed: a number in the config (transformers.AutoConfig "
            "fills in the model's own default, a config.json alone does not)"
        )
    return RotaryConfig(
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        theta=theta,
        scaling=read_scaling(fields, rope, rope_type, head_dim, factor),
        interleaved=_interleaved(fields, model_type),
        mrope_section=section,
        mrope_interleaved=mrope_interleaved,
        max_position=fields.max_position,
    )


def _interleaved(fields: Fields, model_type: str) -> bool:
    interleaved = model_type in families.INTERLEAVED_PAIRS
    if model_type in families.INTERLEAVE_OPTION:
        interleaved = fields.get("rope_interleave", default=interleaved)
    return interleaved


def _rope_dict(fields: Fields, layer_type: str | None) -> dict[str, Any]:
    """The rope parameters of the layer, in the form of transformers 5, without absent ones."""
    top_theta = fields.get("rope_theta", "rotary_emb_base")
    rope = fields.get("rope_parameters")
    if not rope:
        _refuse_second_base(fields)
        rope = fields.get("rope_scaling", default={})
        local_theta = fields.get("rope_local_base_freq")
        if local_theta is not None:
            # Gemma 3 before transformers 5: the scaling is that of the global layers only.
            rope = {
                "full_attention": {"rope_theta": top_theta, **rope},
                "sliding_attention": {"rope_theta": local_theta},
            }
    if not isinstance(rope, Mapping):
        refuse(f"the rope parameters are {rope!r}; allowed: a dict")
    by_layer = {name: value for name, value in rope.items() if isinstance(value, Mapping)}
    if by_layer:
        if layer_type not in rope:
            refuse(f"layer_type is {layer_type!r}; allowed: {', '.join(sorted(by_layer))}")
        if layer_type not in by_layer:
            refuse(f"layer_type is {layer_type!r}; those layers have no rotary embedding")
        # The library reads this one beside the dicts of the layers.
        rope = {**by_layer[layer_type], "truncate": rope.get("truncate")}
    parameters = {name: value for name, value in rope.items() if value is not None}
    if top_theta is not None:
        parameters.setdefault("rope_theta", top_theta)
    if not by_layer and (length := fields.get(ORIGINAL_LENGTH)) is not None:
        # Phi-3 and others keep it beside the rope dict, and that one goes first.
        parameters[ORIGINAL_LENGTH] = length
    return parameters


def _refuse_second_base(fields: Fields) -> None:
    """Refuse an older `config.json` with a second base, for which layers only its model knows."""
    top = fields.config if isinstance(fields.config, Mapping) else {}
    for name, value in top.items():
        if name.endswith("_rope_theta") and value is not None:
            refuse(
                f"{name} is {value!r}; allowed: a base for each kind of layer in rope_parameters "
                "(transformers.AutoConfig converts older configs)"
            )


def _rope_type(rope: dict[str, Any]) -> str:
    given: str = rope.get("rope_type", rope.get("type", "default"))
    rope_type = _ALIASES.get(given, given)
    if rope_type not in _KEYS:
        refuse(f"rope_type is {given!r}; allowed: {', '.join(sorted(_KEYS))}")
    if given == "mrope" and "mrope_section" not in rope:
        refuse("rope_type is 'mrope'; allowed: with mrope_section only")
    if unknown := sorted(rope.keys() - _COMMON - _KEYS[rope_type]):
        shown = ", ".join(f"{name} is {rope[name]!r}" for name in unknown)
        allowed = ", ".join(sorted(_COMMON | _KEYS[rope_type]))
        refuse(f"{shown}, with rope_type {rope_type!r}; allowed: {allowed}")
    return rope_type


def _widths(
    fields: Fields, rope: dict[str, Any], rope_type: str, layer_type: str | None
) -> tuple[int, int, float]:
    """Head dim, rotary dim, and the partial rotary factor."""
    head_dim = _head_dim(fields, layer_type)
    model_type = fields.get("model_type", default="")
    partial = rope.get("partial_rotary_factor")
    whole_head = model_type in families.WHOLE_HEAD
    if whole_head and rope_type == "default":
        return head_dim, head_dim, 1.0
    if partial is None:
        partial = fields.get("partial_rotary_factor", *(() if whole_head else _PARTIAL_NAMES))
    if whole_head and rope_type != "proportional" and partial not in (None, 1):
        refuse(
            f"partial_rotary_factor is {partial!r}, with rope_type {rope_type!r}; allowed: 1, as "
            f"{model_type} rotates the whole head"
        )
    rotary_dim = None if whole_head else fields.get("qk_rope_head_dim", "rotary_dim")
    if partial is None and rotary_dim is None:
        partial = families.PARTIAL_ROTARY_FACTOR.get(model_type)
    if partial is None:
        partial = 1.0
    elif isinstance(partial, bool) or not isinstance(partial, int | float) or not 0 < partial <= 1:
        refuse(f"partial_rotary_factor is {partial!r}; allowed: a number above 0, at most 1")
    if rope_type == "proportional":
        return head_dim, head_dim, partial
    product = int(head_dim * partial)
    if rotary_dim is not None and partial != 1 and product != rotary_dim:
        refuse(
            f"partial_rotary_factor is {partial}; allowed: one that agrees with the rotary "
            f"width of {rotary_dim} that the config also gives (head_dim {head_dim})"
        )
    rotary_dim = product if rotary_dim is None else rotary_dim
    if not whole_head and fields.get("qk_rope_head_dim") is not None:
        head_dim = rotary_dim
    return head_dim, rotary_dim, partial


def _head_dim(fields: Fields, layer_type: str | None) -> int:
    """`D` of the layer; a layer's own goes before the model's."""
    head_dim: int | None = _layer_head_dim(fields, layer_type)
    if head_dim is None:
        mla = () if fields.get("model_type") in families.WHOLE_HEAD else ("qk_rope_head_dim",)
        head_dim = fields.get("head_dim", *mla, *_HEAD_DIM_NAMES)
    if head_dim is not None:
        return head_dim
    hidden: int = fields.get("hidden_size", "n_embd", default=0)
    heads: int = fields.get("num_attention_heads", "n_head", default=0)
    if not hidden or not heads or hidden % heads:
        refuse(
            f"head_dim is missing; allowed: an integer, or a hidden_size ({hidden}) that "
            f"num_attention_heads ({heads}) divides"
        )
    return hidden // heads


def _layer_head_dim(fields: Fields, layer_type: str | None) -> int | None:
    """The head dim of Gemma 4's global layers, and of whichever others have their own."""
    layers = fields.get("per_layer_config")
    saved = isinstance(layers, Mapping) and isinstance(fields.config, Mapping)
    if not saved and not fields.get("is_heterogeneous"):
        return fields.get("global_head_dim") if layer_type == "full_attention" else None
    layer_types = fields.get("layer_types", default=())
    if layer_type not in layer_types:
        allowed = ", ".join(sorted(set(layer_types)))
        refuse(f"layer_type is {layer_type!r}; allowed, as layers differ: {allowed}")
    if not saved:
        return layers[layer_type].head_dim
    # A saved config: overrides by layer number, of those layers that have any.
    numbers = {number for number, name in enumerate(layer_types) if name == layer_type}
    overrides = [value for number, value in layers.items() if int(number) in numbers]
    return next((value["head_dim"] for value in overrides if "head_dim" in value), None)


def _mrope(rope: dict[str, Any], model_type: str) -> tuple[tuple[int, int, int] | None, bool]:
    section = rope.get("mrope_section")
    # Qwen3-Omni writes the flag under both names.
    flag = rope.get("mrope_interleaved", rope.get("interleaved"))
    if flag is not None and section is None:
        refuse(f"mrope_interleaved (or interleaved) is {flag!r}; allowed: with mrope_section only")
    if model_type in families.MROPE:
        default_section, interleaved = families.MROPE[model_type]
        if flag is not None and flag != interleaved:
            refuse(f"mrope_interleaved is {flag!r}; allowed: {interleaved}, for {model_type}")
        section = default_section if section is None else section
    else:
        interleaved = bool(flag)
    if section is None:
        return None, interleaved
    if not isinstance(section, list | tuple) or len(section) != 3:
        refuse(f"mrope_section is {section!r}; allowed: three numbers that sum to R/2")
    temporal, height, width = section
    return (temporal, height, width), interleaved
