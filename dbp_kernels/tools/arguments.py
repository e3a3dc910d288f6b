"""Types of command-line arguments."""

from __future__ import annotations

import argparse

import torch


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not usable here: {first}") from None
    return device
