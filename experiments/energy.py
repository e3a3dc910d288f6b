"""Joules that a GPU has taken, where NVML (the package nvidia-ml-py) tells."""

from __future__ import annotations

import importlib
from typing import Any

import torch


class Meter:
    """Of one device; reads nothing on others than GPUs, nor where anything is missing."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        if device.type != "cuda":
            return
        try:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            self.joules()
        except Exception:  # NVML's errors have no common base but this one where it is not there
            self._nvml = None

    def joules(self) -> float | None:
        """Since the driver was loaded, by everything on the device; ``None``: not known."""
        if self._nvml is None:
            return None
        millijoules: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return millijoules / 1000
