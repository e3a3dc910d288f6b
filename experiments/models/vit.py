"""A vision transformer of plain linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm transformer block on (N, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) with a class token; by default ViT-S/16.

    Args:
        num_classes: number of logits.
        size: side of the images, or (height, width); multiples of ``patch``.
        patch: side of a patch: 16 for 224x224, 4 for 32x32.
        width, depth, heads: ViT-S's by default; ``width`` is a multiple of ``heads``.
        in_channels: channels of the image.

    ``forward`` takes (N, in_channels, height, width) and returns (N, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        size: int | tuple[int, int] = 224,
        patch: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        height, across = (size, size) if isinstance(size, int) else size
        if height % patch or across % patch:
            raise ValueError(f"patch must divide images of {height}x{across}, got {patch}")
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        tokens = (height // patch) * (across // patch) + 1
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():  # as timm's
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))
