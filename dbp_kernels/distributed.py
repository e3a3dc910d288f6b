"""Many processes: second moments of all ranks' samples, and R kept out of DDP's broadcasts.

Every rank reduces the same layers in the same order whatever it has sampled, so that collectives
always match. What travels is n S, n m and n, added up: a layer's patches count alike wherever they
were sampled. S is symmetric, so only its upper part travels, in row strips that start at the
diagonal; layers share buckets of about 25 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dbp_kernels import backends
from dbp_kernels.nn import is_decorrelated

BUCKET_BYTES = 25 * 2**20
_STRIP = 64


@dataclass
class Moments:
    """Sums over patches, from which means follow once all ranks' sums are added.

    second: n S, (G, D, D). first: n m, (G, D), or None where it is not wanted. count: n,
    0-dimensional, of the same dtype.
    """

    second: Tensor
    first: Tensor | None
    count: Tensor

    def mean(self) -> Tensor:
        """S, (G, D, D): demeaned where the first moment is there; 0 where n = 0."""
        n = self.count.clamp(min=1)
        S = self.second / n
        if self.first is not None:
            m = self.first / n
            S = torch.baddbmm(S, m.unsqueeze(-1), m.unsqueeze(-2), alpha=-1)
        return S


def active(process_group: dist.ProcessGroup | None) -> bool:
    """Whether there are other ranks to reduce with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1


def of_first(value: Any, process_group: dist.ProcessGroup | None) -> Any:
    """The value that the group's first rank gives; any object that can be pickled."""
    held = [value]
    dist.broadcast_object_list(held, _first_rank(process_group), group=process_group)
    return held[0]


def _first_rank(process_group: dist.ProcessGroup | None) -> int:
    group = process_group or dist.group.WORLD
    assert group is not None  # there are other ranks
    return dist.get_global_rank(group, 0)


def packed_size(groups: int, size: int, first: bool) -> int:
    """Number of elements of `pack`'s result."""
    strips = sum(min(_STRIP, size - start) * (size - start) for start in range(0, size, _STRIP))
    return groups * (strips + (size if first else 0)) + 1


def pack(moments: Moments, out: Tensor) -> None:
    """Write the moments into the flat tensor ``out`` of `packed_size` elements."""
    parts = [
        moments.second[:, start : start + _STRIP, start:].reshape(-1)
        for start in range(0, moments.second.shape[-1], _STRIP)
    ]
    if moments.first is not None:
        parts.append(moments.first.reshape(-1))
    torch.cat([*parts, moments.count.reshape(1)], out=out)


def unpack(flat: Tensor, groups: int, size: int, first: bool) -> Moments:
    """The inverse of `pack`."""
    second = flat.new_empty(groups, size, size)
    offset = 0
    for start in range(0, size, _STRIP):
        rows = min(_STRIP, size - start)
        strip = flat[offset : offset + groups * rows * (size - start)]
        strip = strip.view(groups, rows, size - start)
        offset += strip.numel()
        second[:, start : start + rows, start:] = strip
        second[:, start + rows :, start : start + rows] = strip[:, :, rows:].mT
    mean = flat[offset : offset + groups * size].view(groups, size) if first else None
    return Moments(second, mean, flat[-1])


def buckets(sizes: Sequence[tuple[torch.device, torch.dtype, int]]) -> list[list[int]]:
    """Indices of consecutive entries of one device and dtype, at most `BUCKET_BYTES` together."""
    result: list[list[int]] = []
    kind, used = None, 0
    for index, (device, dtype, elements) in enumerate(sizes):
        bytes_ = elements * dtype.itemsize
        if kind != (device, dtype) or used + bytes_ > BUCKET_BYTES:
            result.append([])
            kind, used = (device, dtype), 0
        result[-1].append(index)
        used += bytes_
    return result


def all_reduce(
    moments: Iterable[Moments],
    shapes: Sequence[tuple[torch.device, torch.dtype, int, int, bool]],
    process_group: dist.ProcessGroup | None,
) -> Iterator[Moments]:
    """Add up every layer's moments over all ranks, one collective per bucket.

    Args:
        moments: this rank's moments, one layer after another; consumed as buckets fill.
        shapes: (device, dtype, groups, D, whether the first moment is there) for each layer, the
            same on all ranks.
        process_group: the ranks to reduce over; None is the default group.

    Yields the sums in the same order.
    """
    sizes = [(shape[0], shape[1], packed_size(*shape[2:])) for shape in shapes]
    source = iter(moments)
    pending: list[tuple[list[int], Tensor, dist.Work]] = []
    for bucket in buckets(sizes):
        device, dtype, _ = sizes[bucket[0]]
        flat = torch.empty(sum(sizes[i][2] for i in bucket), device=device, dtype=dtype)
        for part in flat.split([sizes[i][2] for i in bucket]):
            pack(next(source), part)
        with _explained():
            work = dist.all_reduce(flat, group=process_group, async_op=True)
        pending.append((bucket, flat, work))
    for bucket, flat, work in pending:
        with _explained():
            work.wait()
        parts = flat.split([sizes[i][2] for i in bucket])
        for index, part in zip(bucket, parts):
            yield unpack(part, *shapes[index][2:])


def broadcast(tensors: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """Overwrite the tensors with those of the group's first rank."""
    source = _first_rank(process_group)
    with _explained():
        for work in [dist.broadcast(t, source, process_group, async_op=True) for t in tensors]:
            work.wait()


@contextmanager
def _explained() -> Iterator[None]:
    """An error of the communication, such as its timeout, names what mostly causes it."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "the ranks' samples could not be added up: every rank must call step() equally often "
            "(decor.step(), or that of an attached optimiser), also where it has no batch, and no "
            f"rank may have stopped ({error})"
        ) from error


def agree_on_backends(devices: Iterable[torch.device], group: dist.ProcessGroup | None) -> None:
    """All ranks run on the backend of all, or "auto" becomes "eager": every R must stay the same.

    A rank whose GPU was full when its kernels were to be verified, say, would round differently.
    ``devices`` are this rank's GPUs. Where a backend was asked for, nothing changes.
    """
    for device in sorted(devices, key=str):
        own = list(backends.NAMES).index(backends.selected(device))
        ranks = torch.tensor([own, -own], device=device)
        dist.all_reduce(ranks, dist.ReduceOp.MAX, group=group)
        if (ranks[0] != -ranks[1]).item():
            backends.give_up(device, "other ranks run on another backend")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner: nn.Module = model.module
        return inner
    return model._modules.get("_orig_mod")  # torch.compile's wrapper


def _R_names(model: nn.Module) -> set[str]:
    return {
        f"{name}.R" if name else "R"
        for name, module in model.named_modules(remove_duplicate=False)
        if is_decorrelated(module)
    }


def ignore_in_ddp(model: nn.Module) -> None:
    """Tell DistributedDataParallel to leave every R in the model alone, and only those that exist.

    DDP would otherwise broadcast every R before every forward pass, though all ranks already
    compute the same one. Works before the model is wrapped and, called with the wrapper, after.
    """
    inner: Any = model  # whose attribute is neither a tensor nor a module
    while inner is not None:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner.parameters_to_ignore |= _R_names(inner.module)
        else:
            known = set(getattr(inner, "_ddp_params_and_buffers_to_ignore", ()))
            gone = {name for name in known if name.split(".")[-1] == "R"}
            names = (known - gone) | _R_names(inner)
            if names:
                inner._ddp_params_and_buffers_to_ignore = sorted(names)
            elif known:
                del inner._ddp_params_and_buffers_to_ignore
        inner = _wrapped(inner)
