"""The networks whose updates, steps and memory are measured."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from bench.core.registry import compile_filter
from bench.core.suite import Job, Settings, batch_of
from experiments.models import AlexNet, ConvNet, ViT, resnet18, resnet34, resnet50


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
