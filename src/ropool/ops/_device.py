"""From a torch device to the plain record that dispatch works with."""

from __future__ import annotations

import functools
import platform

import torch

from ropool.dispatch.spec import Device


@functools.cache
def device_of(device: torch.device) -> Device:
    """The record of `device`. AMD GPUs, which PyTorch calls `cuda`, are `hip`."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Device("hip", properties.name, properties.gcnArchName.split(":")[0])
        return Device("cuda", properties.name, f"sm_{properties.major}{properties.minor}")
    if device.type == "xpu":
        return Device("xpu", torch.xpu.get_device_name(device))
    return Device(device.type, platform.machine())
