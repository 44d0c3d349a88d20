"""Tiny models on disk: a directory as `save_pretrained` leaves it, and a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import tiny
from engine.bytes_tokenizer import END_ID, byte_tokenizer

if TYPE_CHECKING:
    import gguf

CHAT_TEMPLATE = "{% for message in messages %}Q: {{ message['content'] }} A:{% endfor %}"
GGUF_ROTATION = {"rope_type": "default", "rope_theta": 10000.0}


def tiny_model(name: str = "llama") -> Any:
    """A model whose tokens are those of `byte_tokenizer`; the weights of the llama fit what GGUF
    can say of one."""
    return tiny.build(
        name,
        vocab_size=END_ID + 1,
        num_hidden_layers=2,
        eos_token_id=END_ID,
        rms_norm_eps=1e-5,
        rope_parameters=GGUF_ROTATION,
    )


def write_directory(path: Path, name: str = "llama") -> Path:
    """A directory with config, safetensors, tokenizer and chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tiny_model(name).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_gguf(
    path: Path,
    architecture: str = "llama",
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """The same model as one GGUF file, with float32 tensors; `change` adds to it."""
    import gguf

    model = tiny_model()
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(GGUF_ROTATION["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
    writer.add_token_types([1] * END_ID + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(END_ID)
    writer.add_bos_token_id(END_ID)
    writer.add_chat_template(CHAT_TEMPLATE)
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        data = weight.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            data = _interleave(data, heads=data.shape[0] // config.head_dim)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(data)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a neox projection in the order in which GGUF keeps those of a llama: pairs side by
    side."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
