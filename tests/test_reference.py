"""The oracle itself, against torch's unfold, against loops, and against numbers worked by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import case, cases, error, random, rows
from hypothesis import given, settings

from dbp_kernels import reference

F64 = torch.float64

# n = 2 patches of D = 2, and an R that is neither symmetric nor triangular the convenient way.
# x = R z: (5, 2) and (1, -1). <x x^T> = [[13, 4.5], [4.5, 2.5]], so C = 4.5 and v = (12, 1.5).
Z = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=F64)
R = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=F64)
LR = 0.1

# (rule, kappa, demean) -> R_new, loss. Standard, kappa = 1/2, in full: the bracket is
# B = [[6, 2.25], [2.25, 0.75]], B R = [[6, 14.25], [2.25, 5.25]], and the loss
# [1/2 * 2 * 4.5^2 + 1/2 * (12^2 + 1.5^2)] / 2^2. With kappa = 1, V R = [[12, 24], [0, 1.5]]:
# rows scaled. Columns scaled would give [[12, 3], [0, 1.5]].
BY_HAND = {
    ("standard", 0.5, False): ([[0.4, 0.575], [-0.225, 0.475]], 23.34375),
    ("standard", 0.0, False): ([[1.0, 1.55], [-0.45, 0.1]], 10.125),
    ("standard", 1.0, False): ([[-0.2, -0.4], [0.0, 0.85]], 36.5625),
    ("normalized", 0.5, False): ([[-0.2, -0.625], [-0.225, 0.4]], 46.6875),
    # less the mean (2, 0.5): x = +-(2, 1.5), C = 3, v = (3, 1.25)
    ("standard", 0.5, True): ([[0.85, 1.55], [-0.15, 0.6375]], 3.5703125),
}


@pytest.mark.parametrize(("setting", "expected"), BY_HAND.items())
def test_update_by_hand(setting, expected):
    rule, kappa, demean = setting
    R_new, loss = reference.decor_update(Z, R, [], [], [], [], 1, LR, kappa, rule, demean)
    torch.testing.assert_close(R_new, torch.tensor(expected[0], dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(loss, torch.tensor(expected[1], dtype=F64), rtol=1e-14, atol=0)


def test_stats_by_hand():
    C, V = reference.decor_stats(Z, R, [], [], [], [], 1)
    torch.testing.assert_close(C, torch.tensor([[[0.0, 4.5], [4.5, 0.0]]], dtype=F64))
    torch.testing.assert_close(V, torch.tensor([[12.0, 1.5]], dtype=F64))


def test_update_in_one_dimension():
    """D = 1: there is nothing to decorrelate, and 1/(D-1) is not evaluated."""
    z, r = torch.tensor([[2.0], [-1.0]], dtype=F64), torch.tensor([[0.5]], dtype=F64)
    # x = 1, -0.5; v = 0.625 - 1
    for rule, v_weight in (("standard", 0.5), ("normalized", 1.0)):
        R_new, loss = reference.decor_update(z, r, [], [], [], [], 1, LR, 0.5, rule)
        assert R_new.item() == pytest.approx(0.5 + LR * v_weight * 0.375 * 0.5, abs=1e-15)
        assert loss.item() == pytest.approx(0.5 * 0.375**2, abs=1e-15)


def test_update_averages_the_loss_over_groups_only():
    z = torch.cat([Z, 2 * Z], dim=1)
    both = torch.stack([R, R.T])
    R_new, loss = reference.decor_update(z, both, [], [], [], [], 2, LR, 0.5)
    first = reference.decor_update(Z, R, [], [], [], [], 1, LR, 0.5)
    second = reference.decor_update(2 * Z, R.T, [], [], [], [], 1, LR, 0.5)
    torch.testing.assert_close(R_new, torch.stack([first[0], second[0]]))
    torch.testing.assert_close(loss, (first[1] + second[1]) / 2)


def test_no_samples():
    c = case(0, 2, (5,), 3)
    r = c.R(flat=True)
    arguments = c.arguments
    assert not reference.patch_gram(c.input(), *arguments).any()
    assert not reference.patch_mean(c.input(), *arguments).any()
    C, V = reference.decor_stats(c.input(), r, *arguments)
    assert not C.any()
    assert (V == -1).all()
    for demean in (False, True):
        R_new, loss = reference.decor_update(c.input(), r, *arguments, 1.0, 0.5, demean=demean)
        assert torch.equal(R_new, r)
        assert loss.item() == 0


def test_unknown_rule():
    with pytest.raises(ValueError, match="rule='other'"):
        reference.decor_update(Z, R, [], [], [], [], 1, LR, 0.5, "other")


@given(cases(dims=(2,)))
def test_patches_are_those_of_torch_unfold(c):
    x = c.input()
    kernel, stride, padding, dilation, groups = c.arguments
    columns = F.unfold(x, kernel, dilation, padding, stride)  # (N, C * taps, positions)
    per_group = columns.view(c.batch, groups, -1, columns.shape[-1])
    expected = per_group.permute(1, 0, 3, 2).flatten(1, 2)
    assert torch.equal(reference.patches(x, *c.arguments), expected)


def looped_patches(x, kernel, stride, padding, dilation, groups):
    """The definition, one number at a time."""
    n, channels, *sizes = x.shape
    out = [
        len(range(0, size + 2 * p - d * (k - 1), s))
        for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation)
    ]
    result = []
    for g in range(groups):
        patches = []
        for image in range(n):
            for position in itertools.product(*map(range, out)):
                patch = []
                for c in range(g * channels // groups, (g + 1) * channels // groups):
                    for tap in itertools.product(*map(range, kernel)):
                        q = tuple(
                            s * p + d * k - pad
                            for s, p, d, k, pad in zip(stride, position, dilation, tap, padding)
                        )
                        inside = all(0 <= i < size for i, size in zip(q, sizes))
                        patch.append(x[(image, c, *q)].item() if inside else 0.0)
                patches.append(patch)
        result.append(patches)
    return torch.tensor(result, dtype=x.dtype)


@pytest.mark.parametrize(
    "c",
    [
        case(2, 2, (5,), 3, padding=1),
        case(2, 4, (7,), 3, stride=2, padding=2, dilation=2, groups=2),
        case(1, 2, (3, 4), (2, 3), stride=(1, 2), padding=(1, 0), groups=2),
        case(2, 2, (3, 2, 4), (2, 1, 3), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(2, 1, 1)),
    ],
    ids=lambda c: f"{len(c.size)}d",
)
def test_everything_against_loops(c):
    x, r = c.input(), c.R()
    z = looped_patches(x, *c.arguments)
    n = z.shape[1]
    assert torch.equal(reference.patches(x, *c.arguments), z)
    S = sum(torch.einsum("gi,gj->gij", z[:, p], z[:, p]) for p in range(n)) / n
    assert error(reference.patch_gram(x, *c.arguments), S) < 1e-14
    m = sum(z[:, p] for p in range(n)) / n
    assert error(reference.patch_mean(x, *c.arguments), m) < 1e-14
    white = torch.stack([torch.stack([r[g] @ patch for patch in z[g]]) for g in range(c.groups)])
    second = torch.einsum("gni,gnj->gij", white, white) / n
    C, V = reference.decor_stats(x, r, *c.arguments)
    assert error(C + torch.diag_embed(V + 1), second) < 1e-14
    assert not C.diagonal(dim1=-2, dim2=-1).any()
    # (groups, n, D) -> (N, groups * D, *output)
    maps = white.view(c.groups, c.batch, -1, white.shape[-1]).permute(1, 0, 3, 2)
    decorrelated = reference.decorrelate(x, r, *c.arguments)
    assert decorrelated.shape == (c.batch, c.groups * white.shape[-1], *c.geometry.output_size)
    assert error(decorrelated.flatten(2), maps.flatten(1, 2)) < 1e-14


@settings(max_examples=30)
@given(cases())
def test_decorrelate_is_a_convolution(c):
    x, r = c.input(), c.R()
    kernel, *rest = c.arguments
    weight = r.view(c.groups * c.geometry.dim, c.channels // c.groups, *kernel)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    assert error(reference.decorrelate(x, r, *c.arguments), conv(x, weight, None, *rest)) < 1e-13


def test_rows_with_groups():
    c = rows((2, 3, 6), groups=2)
    x, r = c.input(), c.R()
    z = x.view(6, 2, 3)
    assert torch.equal(reference.patches(x, *c.arguments), z.transpose(0, 1))
    expected = torch.stack([torch.cat([r[0] @ a[0], r[1] @ a[1]]) for a in z]).view(2, 3, 6)
    assert error(reference.decorrelate(x, r, *c.arguments), expected) < 1e-14


def test_demean_is_the_covariance():
    x = random((50, 4)) + 2.0
    r = torch.eye(4, dtype=F64)
    lr = 1.0
    R_new, _ = reference.decor_update(x, r, [], [], [], [], 1, lr, 0.0, demean=True)
    covariance = torch.cov(x.T, correction=0)
    expected = r - lr * (covariance - torch.diag(covariance.diagonal()))
    assert error(R_new, expected) < 1e-13
