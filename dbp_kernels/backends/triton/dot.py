"""The tile product of every matrix kernel: precision of float32 operands, bfloat16 when interpreted."""

import triton
import triton.language as tl


@triton.jit
def round_tf32(x):
    """float32 rounded to the nearest tf32 value.

    Tensor cores drop the low 13 bits. Truncated operands are all too small, and that bias does not
    average out over a long sum as rounding errors do.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a NaN of all ones would carry into the sign and be zero


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b in float32. PRECISION ("ieee", "tf32x3" or "tf32") is that of float32 operands.

    "tf32x3" splits an operand into a tf32 value and the rest, and adds the products of values and
    rests to that of the values: what is lost is the product of the rests, and what tf32 does not
    hold of a rest, some 2^-21 of the operand (absolutely, 2^-126 times the other: a denormal rest
    may count as zero). Sums over one block of the inner dimension are added to acc in float32: tensor
    cores truncate as they add. Where an operand is not finite its rest is NaN; Triton drops NaN from
    the sum of rests, and the product of the values decides: Inf stays Inf, NaN stays NaN. A number
    within 2^-12 of the largest float32 rounds to Inf. The interpreter computes in float32.

    UPCAST casts 16-bit operands to float32: Triton's interpreter multiplies bfloat16 wrongly.
    """
    if a.dtype == tl.float32:
        if PRECISION == "tf32":
            a = round_tf32(a)
            b = round_tf32(b)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    elif UPCAST:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc
