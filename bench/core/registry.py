"""The one registry of benchmark cases: layer inputs whose patch second moment S is wanted.

S depends on a layer's input and window only, so layers that differ in their output channels share
a case, and so do equal layers of different networks.
"""

from __future__ import annotations

import re

from dbp_kernels.tools.cases import Case, conv, linear, resnets, with_batch

RESNETS = "(?<!-)resnet"  # the pattern that selects layers of ResNets at 224x224
_CIFAR = "cifar-resnet18"
_NET = "cifar-convnet"


def _alexnet(N: int = 32) -> list[Case]:
    """AlexNet's layers at 224x224 (the one-tower form); the widest linear one is left out."""
    tag = ("alexnet",)
    return [
        conv(N, 3, 224, 11, stride=4, padding=2, tags=(*tag, "stem", "core")),
        conv(16, 64, 27, 5, tags=(*tag, "core")),
        conv(N, 64, 27, 5, tags=tag),
        *(conv(N, channels, 13, 3, tags=tag) for channels in (192, 384, 256)),
        linear(N, 4096, tag),
    ]


def _cifar(N: int = 128) -> list[Case]:
    """CIFAR-form ResNet-18 and the 3-64-64-128 ConvNet at 32x32."""
    cases = [conv(N, 3, 32, 3, tags=(_CIFAR, _NET))]
    for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4)):
        cases.append(conv(N, channels, size, 3, tags=(_CIFAR,)))
    for channels, size in ((64, 32), (128, 16), (256, 8)):
        cases.append(conv(N, channels, size, 3, stride=2, tags=(_CIFAR,)))
        cases.append(conv(N, channels, size, 1, stride=2, tags=(_CIFAR,)))
    cases += [conv(N, 64, size, 3, tags=(_NET,)) for size in (16, 8)]
    return [*cases, linear(N, 512, (_CIFAR,)), linear(N, 2048, (_NET,))]


def _extras() -> list[Case]:
    """What the networks above lack: a large image, dilation, groups, a wide stride-1 kernel."""
    return [
        conv(4, 64, 224, 3, tags=("extra",)),
        conv(32, 128, 28, 3, dilation=2, tags=("extra",)),
        conv(32, 128, 56, 3, groups=32, tags=("extra",)),
        conv(32, 32, 28, 7, tags=("extra",)),
        linear(128, 784, ("extra",)),
    ]


def all_cases() -> list[Case]:
    """The whole registry, in a fixed order, names unique."""
    return [*resnets(), *_alexnet(), *_cifar(), *_extras()]


def compile_filter(pattern: str | None) -> re.Pattern[str]:
    """The regular expression of a filter; ``None`` matches all. Raises ValueError for a bad one."""
    try:
        return re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"filter must be a regular expression, got {pattern!r}: {error}") from None


def select(
    pattern: str | None = None, batch: int | None = None, tag: str | None = None
) -> list[Case]:
    """Registry cases whose "name tag tag ..." matches the regular expression ``pattern``.

    ``batch`` replaces every batch size (cases that become equal are kept once); ``tag`` keeps the
    cases that carry it. Raises ValueError for a pattern that is no regular expression.
    """
    regex = compile_filter(pattern)
    cases: dict[str, Case] = {}
    for case in all_cases():
        if tag is not None and tag not in case.tags:
            continue
        case = case if batch is None else with_batch(case, batch)
        if regex.search(" ".join((case.name, *case.tags))):
            cases.setdefault(case.name, case)
    return list(cases.values())
