"""Rivals that know nothing of shifts: they multiply whole patches, or whole images with patterns.

K-FAC libraries unfold and multiply; einconv contracts the image with index patterns instead; quack
has the dense symmetric product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.registry import Case
from dbp_kernels import reference

_MOST_BYTES = 2**35  # of partial results


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a float32 (float64) result: by out_dtype on CUDA, by upcasting on the CPU.

    Takes matrices, or batches of them.
    """
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def unfold_matmul(x: Tensor, case: Case) -> Tensor:
    """im2col, then one matrix product: what K-FAC libraries do."""
    if case.is_linear:
        z = x.reshape(-1, case.C)
        return (product(z.t(), z) / z.shape[0]).unsqueeze(0)
    patches = F.unfold(x, case.kernel, case.dilation, case.padding, case.stride)
    if case.groups == 1:
        z = patches.transpose(1, 2).reshape(-1, case.D)
        return (product(z.t(), z) / z.shape[0]).unsqueeze(0)
    grouped = patches.reshape(x.shape[0], case.groups, case.D, -1)
    z = grouped.permute(1, 0, 3, 2).reshape(case.groups, -1, case.D)
    return product(z.transpose(1, 2), z) / z.shape[1]


def batched_matmul(x: Tensor, case: Case) -> Tensor:
    """im2col, then one product an image in a batched call, and their sum."""
    z = F.unfold(x, case.kernel, case.dilation, case.padding, case.stride)
    z = z.view(case.N, case.groups, case.D, -1).flatten(0, 1)
    sums = product(z, z.transpose(1, 2)).view(case.N, case.groups, case.D, case.D)
    return sums.sum(0) / case.n


def batched_why_not(case: Case) -> str:
    """Where it does not apply."""
    if case.is_linear:
        return "one product"
    too_large = 4 * case.N * case.result_elements > _MOST_BYTES
    return "more than 32 GiB of partial results" if too_large else ""


def compiled_reference(x: Tensor, case: Case) -> Tensor:
    """The definition (reference.py) under torch.compile; the first call on a case compiles."""
    return _compiled(case, x.dtype)(x)


@lru_cache(maxsize=1)
def _compiled(case: Case, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()  # every case is compiled for its own sizes, without a limit on their number
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def patch_gram(x: Tensor) -> Tensor:
        return reference.patch_gram(x.to(wide), *case.window)

    return torch.compile(patch_gram, dynamic=False)


def einconv_kfc(x: Tensor, case: Case) -> Tensor:
    """einconv's input factor of KFC: a contraction of the image with index patterns."""
    from einconv.expressions import convNd_kfc

    wide = x if x.dtype == torch.float64 else x.float()
    equation, operands, shape = convNd_kfc.einsum_expression(
        wide, case.kernel, case.stride, case.padding, case.dilation, case.groups
    )
    # its mean is over the batch, ours over all patches
    return torch.einsum(equation, *operands).reshape(shape) * (case.N / case.n)


def einconv_why_not(case: Case) -> str:
    """Where it does not apply."""
    return "not a convolution" if case.is_linear else ""


def quack_symmetric(x: Tensor, case: Case) -> Tensor:
    """im2col, then quack's symmetric product (NOT RUN YET: it needs a Hopper or Blackwell GPU)."""
    from quack.gemm_interface import gemm_symmetric

    z = x if case.is_linear else F.unfold(x, case.kernel, case.dilation, case.padding, case.stride)
    z = z if case.is_linear else z.transpose(1, 2).reshape(-1, case.D)
    S = x.new_empty((case.D, case.D), dtype=torch.float32)
    gemm_symmetric(z.t(), z, out=S, alpha=1 / case.n)
    return S[None]


def quack_why_not(case: Case) -> str:
    """Where it does not apply: rows of 16 bytes, one group."""
    if case.groups != 1:
        return "groups"
    return "D not a multiple of 8" if case.D % 8 else ""
