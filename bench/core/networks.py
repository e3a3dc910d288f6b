"""The networks whose updates, steps and memory are measured, and the two that experiments lack."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.registry import compile_filter
from bench.core.suite import Job, Settings, batch_of
from experiments.models import ConvNet, resnet18, resnet34, resnet50


@dataclass(frozen=True)
class StepCase:
    """A network to train on random images of shape (batch, 3, size, size).

    ``pairs`` is the default number of alternating pairs.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: int
    size: int
    classes: int
    pairs: int

    def named(self, batch: int | None = None) -> str:
        """With the batch size, the case's own by default."""
        return f"{self.name} b{batch or self.batch}"


class AlexNet(nn.Sequential):
    """Krizhevsky's (2014) one-tower AlexNet for (N, 3, 224, 224), with torchvision's sizes."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Flatten(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )


class _Block(nn.Module):
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

    ``forward`` takes (N, 3, size, size) and returns (N, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        size: int = 224,
        patch: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


SMALL = (
    StepCase("convnet 32x32", lambda: ConvNet(3, (64, 64, 128)), 128, 32, 10, 25),
    StepCase("resnet18 32x32", lambda: resnet18(10, stem="cifar"), 128, 32, 10, 9),
)


def at_224(batch: int, pairs: int) -> tuple[StepCase, ...]:
    """The networks at ImageNet's size; AlexNet and the ResNets are the paper's."""
    builders: dict[str, Callable[[int], nn.Module]] = {
        "resnet18": resnet18,
        "resnet34": resnet34,
        "resnet50": resnet50,
        "alexnet": AlexNet,
        "vit-s": ViT,
    }
    return tuple(
        StepCase(f"{name} 224x224", lambda build=build: build(1000), batch, 224, 1000, pairs)
        for name, build in builders.items()
    )


def matching(cases: Sequence[StepCase], pattern: re.Pattern[str]) -> list[StepCase]:
    """The cases whose name matches."""
    return [case for case in cases if pattern.search(case.name)]


def jobs_on(
    suite: str,
    run_case: Callable[..., dict],
    cases: Sequence[StepCase],
    options: argparse.Namespace,
    settings: Settings,
    rounds: int | None = None,
    traced: bool = False,
    **more: object,
) -> Iterator[Job]:
    """The networks that --filter names; --quick alone takes the first.

    With several of them each has its own trace, <PATH>-<network>.
    """
    pattern = compile_filter(options.filter)
    if options.quick and not options.filter:
        cases = cases[:1]
    batch = batch_of(options)
    chosen = matching(cases, pattern)
    for case in chosen:
        own = dict(more)
        if traced and options.trace:
            slug = "-" + case.named(batch).replace(" ", "-") if len(chosen) > 1 else ""
            own["trace"] = options.trace.with_stem(options.trace.stem + slug)

        def run(tick, case=case, own=own):
            return run_case(case, settings, batch=batch, sample=options.sample, tick=tick, **own)

        yield Job(suite, case.named(batch), run, rounds or settings.pairs or case.pairs)


def cases_on(
    options: argparse.Namespace, cpu: Sequence[StepCase], usual: str, gpu: Sequence[StepCase]
) -> Sequence[StepCase]:
    """The cases of the device; on a CPU without --filter only the ``usual``, which take minutes."""
    if options.device.type != "cpu":
        return gpu
    return cpu if options.filter else matching(cpu, compile_filter(usual))
