"""The memory of a sample, written to from step to step: laid out as the batch is, or as kernels read it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dbp_kernels import backends
from dbp_kernels.backends.rows import empty, widened
from dbp_kernels.plain_call import plain

_PACKED = (torch.float16, torch.bfloat16, torch.float32)  # the dtypes that kernels copy from


class SampleMemory:
    """Holds the first sample, and others in its place.

    In rows of channels (see ``backends/rows.py``) a sample looks like any other to whoever reads it:
    it is a view of the images. Only kernels that want rows see that they need not copy it once more.

    Args:
        batch: (N, ...), from which samples are taken.
        size: images of the first sample.
        chosen: which ones; None: the first.
        dtype: of the samples.
        kernels: the backend that will read them as rows of channels; None: they lie as in the batch.
        channels: the dimension of the channels, 1 or the last one.

    Attributes:
        images: as many as have been needed.
    """

    def __init__(
        self,
        batch: Tensor,
        size: int,
        chosen: Tensor | None,
        dtype: torch.dtype,
        kernels: str | None = None,
        channels: int = 1,
    ) -> None:
        self._layout = _layout(batch, dtype)
        self._packing: Callable[[Tensor, Tensor], Callable[..., None]] | None = None
        self._kept: tuple[tuple[object, ...], Callable[..., None]] | None = None
        if kernels is None:
            taken = batch[:size] if chosen is None else batch[chosen]
            self.images = taken.to(dtype, copy=chosen is None)
            return
        rows = empty(batch[:size].movedim(channels, 1), dtype).zero_()
        self.images = rows[:, : batch.shape[channels]].movedim(1, channels)
        if channels == 1 and batch.stride(1) != 1:
            # torch's copies do not turn images in shared memory, and take several times as long
            self._packing = backends.module(kernels).packing
        self.write(batch, size, chosen)

    def fits(self, batch: Tensor, size: int, dtype: torch.dtype) -> bool:
        """Whether such a sample of a batch can be written here, under the backend that is asked for."""
        return self._layout == _layout(batch, dtype) and len(self.images) >= size

    def write(self, batch: Tensor, size: int, chosen: Tensor | None) -> Tensor:
        """The sample: a copy of the first ``size`` images, or of the chosen ones."""
        sample = self.images if len(self.images) == size else self.images[:size]
        if self._packing is not None and batch.dtype in _PACKED and plain(batch):
            taken = batch[:size] if chosen is None else batch.index_select(0, chosen)
            self._pack(taken, widened(sample))
        elif chosen is None:
            sample.copy_(batch[:size])
        elif batch.dtype == sample.dtype:
            torch.index_select(batch, 0, chosen, out=sample)
        else:
            sample.copy_(batch.index_select(0, chosen))
        return sample

    def _pack(self, x: Tensor, rows: Tensor) -> None:
        """Copies by a kernel. Its launch is kept here: to look it up takes as long as to make it."""
        kind = len(x), x.stride(), x.dtype
        if self._kept is None or self._kept[0] != kind:
            assert self._packing is not None
            self._kept = kind, self._packing(x, rows)
        self._kept[1](x=x, out=rows, mean=None)


def _layout(batch: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    # whoever asks for another backend may not trust this one's kernels
    return batch.shape[1:], batch.stride(), dtype, batch.device, backends.requested()
