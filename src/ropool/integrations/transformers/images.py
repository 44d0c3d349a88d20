"""The images of a prompt, as the vision part of its model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ropool.engine import PromptInputs
from ropool.errors import RopoolError
from ropool.integrations.transformers.model import PooledModel


@torch.inference_mode()
def image_inputs(
    model: PooledModel, prompt: Sequence[int], pixel_values: Tensor, image_grid_thw: Tensor
) -> PromptInputs:
    """Return what `Engine.add` takes beside a prompt with images: their features, and the position
    of each token in time, height and width (M-RoPE, arXiv:2409.12191).

    Args:
        model: a Qwen2-VL model.
        prompt: its tokens; each image has one `image_token_id` a feature.
        pixel_values: `[patches, values]` of all images, as the processor of the library makes them.
        image_grid_thw: `[images, 3]`, integer: the patches of each image in the three directions.

    Raises `RopoolError` for a model of another family, and when tokens, features and patches differ
    in number or two images stand side by side, which the library cannot number.
    """
    original = model.original
    family: str = original.config.model_type
    if family != "qwen2_vl":
        raise RopoolError(f"image_inputs: model is of family {family!r}; allowed: qwen2_vl")
    patches = image_grid_thw.prod(-1).sum() if image_grid_thw.dim() == 2 else None
    if patches is None or image_grid_thw.shape[1] != 3 or len(pixel_values) != patches:
        raise RopoolError(
            f"image_inputs: pixel_values is {list(pixel_values.shape)}, image_grid_thw is "
            f"{image_grid_thw.tolist()}; allowed: [images, 3], with as many patches as pixel_values"
        )
    device = model.spec.device
    tokens = torch.tensor([list(prompt)], device=device)
    grid = image_grid_thw.to(device)
    is_image = tokens == original.config.image_token_id
    vision = original.model.visual
    needed = grid.prod(-1) // vision.spatial_merge_size**2
    if int(is_image.sum()) != int(needed.sum()):
        raise RopoolError(
            f"image_inputs: prompt has {int(is_image.sum())} image tokens; the images have "
            f"{int(needed.sum())} features"
        )
    runs = [len(list(run)) for image, run in groupby(is_image[0].tolist()) if image]
    if runs != needed.tolist():
        raise RopoolError(
            f"image_inputs: the image tokens of prompt stand in runs of {runs}; allowed: one run "
            f"for each image, of {needed.tolist()}"
        )
    features = original.model.get_image_features(pixel_values.to(device), grid).pooler_output
    positions, _ = original.model.get_rope_index(tokens, is_image.int(), image_grid_thw=grid)
    places = is_image[0].nonzero()[:, 0].split(needed.tolist())
    embeddings = {int(own[0]): rows for own, rows in zip(places, features, strict=True)}
    return PromptInputs(positions[:, 0], embeddings)
