"""The Python functions: composites equal plain layers with A = W R; strings, ints, unbatched input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, case, cases, error, moment_error, random, rows, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import op_db

import dbp_kernels as dbp
from dbp_kernels import reference
from dbp_kernels.products import onednn, rows_times

F64 = torch.float64
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DECOR = {1: dbp.decor_conv1d, 2: dbp.decor_conv2d, 3: dbp.decor_conv3d}


def near_identity(groups, dim, dtype=F64, seed=1):
    R = torch.eye(dim, dtype=dtype) + random((groups, dim, dim), dtype, seed) / max(1, dim) ** 0.5
    return R[0] if groups == 1 else R


def condensed(weight, R, groups=1):
    """A = W R by loops over groups and patches."""
    W = weight.reshape(groups, -1, R.shape[-1])
    R = R.reshape(groups, R.shape[-2], R.shape[-1])
    A = [[torch.mv(R[g].T, w) for w in W[g]] for g in range(groups)]
    return torch.stack([torch.stack(a) for a in A]).reshape(weight.shape)


def condensed_transposed(weight, R, groups=1):
    """A[g, j] = sum_i R[g, i, j] W[g, i]."""
    W = weight.reshape(groups, R.shape[-1], -1)
    R = R.reshape(groups, R.shape[-2], R.shape[-1])
    A = [
        [sum(R[g, i, j] * W[g, i] for i in range(R.shape[-1])) for j in range(R.shape[-1])]
        for g in range(groups)
    ]
    return torch.stack([torch.stack(a) for a in A]).reshape(weight.shape)


# --------------------------------------------------------------------------- layers


@settings(max_examples=120)
@given(cases(min_batch=0), st.sampled_from(LAYOUTS), st.booleans(), st.integers(1, 3))
def test_decor_conv_is_a_convolution_with_W_R(c, layout, has_bias, out_per_group):
    dims = len(c.size)
    if c.batch == 0 and layout == "expanded":
        layout = "contiguous"
    x = c.input(layout=layout)
    kernel, *rest = c.arguments
    out = out_per_group * c.groups
    weight = random((out, c.channels // c.groups, *kernel), seed=2)
    bias = random((out,), seed=3) if has_bias else None
    R = c.R()
    y = DECOR[dims](x, weight, R, bias, *rest)
    plain = PLAIN[dims](x, condensed(weight, R, c.groups), bias, *rest)
    assert error(y, plain) < 1e-12
    # y = W x + b with x = R z: through the decorrelated patches themselves
    if c.batch:
        z = reference.decorrelate(x, R, *c.arguments).unflatten(1, (c.groups, -1))
        W = weight.reshape(c.groups, out_per_group, -1)
        through = torch.einsum("god,ngd...->ngo...", W, z).flatten(1, 2)
        if has_bias:
            through = through + bias.view(-1, *[1] * dims)
        assert error(y, through) < 1e-12
    eye = torch.eye(c.geometry.dim, dtype=F64).expand(c.groups, -1, -1)
    assert torch.equal(
        DECOR[dims](x, weight, eye, bias, *rest), PLAIN[dims](x, weight, bias, *rest)
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("stride", "padding", "output_padding", "dilation"),
    [(1, 0, 0, 1), (2, 1, 1, 1), ((2, 3), (1, 0), (1, 2), (1, 2)), (1, 2, 0, 2)],
)
@pytest.mark.parametrize("batched", [True, False])
def test_decor_conv_transpose2d(groups, stride, padding, output_padding, dilation, batched):
    x = random((2, 4, 5, 6) if batched else (4, 5, 6))
    weight, bias = random((4, 3, 3, 2), seed=2), random((3 * groups,), seed=3)
    R = near_identity(groups, 4 // groups)
    rest = (stride, padding, output_padding, groups, dilation)
    y = dbp.decor_conv_transpose2d(x, weight, R, bias, *rest)
    A = condensed_transposed(weight, R, groups)
    assert error(y, F.conv_transpose2d(x, A, bias, *rest)) < 1e-13
    # the layer's input is decorrelated, pixel by pixel
    pixels = x if batched else x[None]
    white = reference.decorrelate(pixels, R, [1, 1], [1, 1], [0, 0], [1, 1], groups)
    through = F.conv_transpose2d(white, weight, bias, *rest)
    assert error(y, through if batched else through[0]) < 1e-13
    eye = torch.eye(4 // groups, dtype=F64).expand(groups, -1, -1)
    plain = F.conv_transpose2d(x, weight, bias, *rest)
    assert torch.equal(dbp.decor_conv_transpose2d(x, weight, eye, bias, *rest), plain)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_decor_linear(shape, has_bias):
    x, weight = random(shape), random((4, 5), seed=2)
    bias = random((4,), seed=3) if has_bias else None
    R = near_identity(1, 5)
    y = dbp.decor_linear(x, weight, R, bias)
    assert error(y, F.linear(x, condensed(weight, R), bias)) < 1e-13
    assert error(y, F.linear(torch.einsum("ij,...j->...i", R, x), weight, bias)) < 1e-13
    eye = torch.eye(5, dtype=F64)
    assert torch.equal(dbp.decor_linear(x, weight, eye, bias), F.linear(x, weight, bias))
    assert torch.equal(dbp.decor_linear(x, weight, eye[None], bias), F.linear(x, weight, bias))


@settings(max_examples=80)
@given(cases(min_batch=0), st.booleans())
def test_decorrelate(c, flat):
    x, R = c.input(), c.R(flat=flat)
    expected = reference.decorrelate(x, R, *c.arguments)
    assert error(dbp.decorrelate(x, R, *c.arguments), expected) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 0, 6), (2, 3, 6)], ids=str)
def test_decorrelate_rows(shape, groups):
    x, R = random(shape), near_identity(groups, 6 // groups)
    out = dbp.decorrelate(x, R, (), groups=groups)
    assert error(out, reference.decorrelate(x, R, [], [], [], [], groups)) < 1e-13
    assert out.shape == shape


def test_decorrelating_makes_white():
    """decorrelate with the inverse square root of S gives patches of second moment I."""
    x = random((4, 3, 9, 9))
    S = dbp.patch_gram(x, 3, padding=1)[0]
    values, vectors = torch.linalg.eigh(S)
    R = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    white = dbp.decorrelate(x, R, 3, padding=1)
    eye = torch.eye(27, dtype=F64)
    assert error(dbp.patch_gram(white, 1)[0], eye) < 1e-10
    C, V = dbp.decor_stats(x, R, 3, padding=1)
    assert C.abs().max() < 1e-10
    assert V.abs().max() < 1e-10
    R_new, loss = dbp.decor_update(x, R, 3, padding=1, lr=1.0)
    assert error(R_new, R) < 1e-9
    assert loss < 1e-18


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_every_operand(layout):
    c = case(2, 4, (6, 7), 3, padding=1, groups=2)
    x = c.input(layout=layout)
    weight = strided(random((6, 2, 3, 3), seed=2), layout)
    R = strided(c.R(), layout)
    y = dbp.decor_conv2d(x, weight, R, padding=1, groups=2)
    dense = dbp.decor_conv2d(
        x.contiguous(), weight.contiguous(), R.contiguous(), padding=1, groups=2
    )
    assert error(y, dense) < 1e-13
    for ours, oracle in zip(
        dbp.decor_stats(x, R, 3, padding=1, groups=2), reference.decor_stats(x, R, *c.arguments)
    ):
        assert error(ours, oracle) < 1e-12
    R_new, _ = dbp.decor_update(x, R, 3, padding=1, groups=2, lr=0.1)
    assert error(R_new, reference.decor_update(x, R, *c.arguments, 0.1, 0.5)[0]) < 1e-12


# --------------------------------------------------------------------------- gradients


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_gradients(dims, groups):
    size, kernel = (5, 4, 3)[:dims], (3, 2, 2)[:dims]
    x = random((2, 4, *size))
    weight, bias = random((4, 4 // groups, *kernel), seed=2), random((4,), seed=3)
    R = near_identity(groups, weight[0].numel())
    rest = (1, 1, 1, groups)
    x, weight, bias, R = leaves(x, weight, bias, R)
    y = DECOR[dims](x, weight, R, bias, *rest)
    probe = random(y.shape, seed=5)
    ours = torch.autograd.grad((y * probe).sum(), (x, weight, bias, R))
    A = leaves(condensed(weight, R, groups))[0]
    plain = PLAIN[dims](x, A, bias, *rest)
    dx, dA, db = torch.autograd.grad((plain * probe).sum(), (x, A, bias))
    dA = dA.reshape(groups, -1, R.shape[-1])
    W = weight.detach().reshape(dA.shape)
    R3 = R.detach().reshape(groups, R.shape[-2], R.shape[-1])
    expected = (dx, (dA @ R3.mT).reshape(weight.shape), db, (W.mT @ dA).reshape(R.shape))
    for name, got, want in zip(("input", "weight", "bias", "R"), ours, expected):
        assert error(got, want) < 1e-12, name


def test_R_gets_no_gradient_unless_it_asks():
    x, weight, R = random((2, 3, 5, 5)), random((4, 3, 3, 3), seed=2), near_identity(1, 27)
    x, weight = leaves(x, weight)
    dbp.decor_conv2d(x, weight, R).sum().backward()
    assert R.grad is None
    assert x.grad is not None
    assert weight.grad is not None


def composites():
    x1, x2, x3 = random((2, 2, 4)), random((1, 2, 3, 3)), random((1, 2, 2, 2, 2))
    w1, w2, w3 = (
        random((2, 1, 2), seed=2),
        random((2, 2, 2, 2), seed=2),
        random((2, 1, 1, 2, 2), seed=2),
    )
    b = random((2,), seed=3)
    yield "conv1d", lambda *t: dbp.decor_conv1d(*t, groups=2), (x1, w1, near_identity(2, 2), b)
    yield (
        "conv2d",
        lambda *t: dbp.decor_conv2d(*t, padding="same"),
        (x2, w2, near_identity(1, 8), b),
    )
    yield "conv3d", lambda *t: dbp.decor_conv3d(*t, groups=2), (x3, w3, near_identity(2, 4), b)
    yield (
        "conv_transpose2d",
        lambda *t: dbp.decor_conv_transpose2d(*t, stride=2),
        (x2, w2, near_identity(1, 2), b),
    )
    yield "linear", dbp.decor_linear, (x1, random((2, 4), seed=2), near_identity(1, 4), b)
    yield (
        "decorrelate",
        lambda x, R: dbp.decorrelate(x, R, 2, padding=1),
        (x2, near_identity(1, 8)),
    )
    yield (
        "decorrelate rows",
        lambda x, R: dbp.decorrelate(x, R, (), groups=2),
        (x1, near_identity(2, 2)),
    )


COMPOSITES = list(composites())


@pytest.mark.parametrize(
    ("function", "inputs"), [c[1:] for c in COMPOSITES], ids=[c[0] for c in COMPOSITES]
)
def test_composites_gradcheck(function, inputs):
    inputs = leaves(*inputs)
    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, inputs)


def in_parts(monkeypatch):
    monkeypatch.setattr(rows_times, "_LARGE", 8)
    monkeypatch.setattr(rows_times, "_PART", 4)
    return "aten::bmm", [[[2, 2, 4], [2, 4, 8]]]


def by_onednn(monkeypatch):
    """As on a CPU that it pays on, but in float64, which oneDNN does not have."""
    monkeypatch.setattr(onednn, "faster", lambda X, Y, recorded: not recorded)
    monkeypatch.setattr(onednn, "product", torch.mm)
    return "_ByOneDNN", [[[2, 8], [8, 8]]]


@pytest.mark.parametrize("way", [in_parts, by_onednn])
def test_ways_to_multiply_by_a_large_R(way, monkeypatch):
    """Every way has all the derivatives, transforms and graphs of one product."""
    x, weight, R, b = random((3, 8)), random((2, 8), seed=2), near_identity(1, 8), random((2,))
    expected = dbp.decor_linear(x, weight, R, b)
    name, calls = way(monkeypatch)
    with torch.profiler.profile(record_shapes=True) as profile:
        found = dbp.decor_linear(x, weight.requires_grad_(), R, b)
    torch.testing.assert_close(found, expected)
    assert [event.input_shapes for event in profile.events() if event.name == name] == calls
    weight = weight.detach()
    test_composites_gradcheck(dbp.decor_linear, (x, weight, R, b))
    torch.library.opcheck(torch.ops.dbp.decor_linear.default, (*leaves(x, weight, R), b))
    many = torch.stack([weight, 2 * weight])
    found = torch.func.vmap(lambda w: dbp.decor_linear(x, w, R))(many)
    torch.testing.assert_close(found, torch.stack([x @ (w @ R).mT for w in many]))
    hessian = torch.func.hessian(lambda w: dbp.decor_linear(x, w, R).square().sum())(weight)
    xR = x @ R.mT
    expected_hessian = torch.einsum("ac,bd->abcd", torch.eye(2), 2 * xR.mT @ xR)
    torch.testing.assert_close(hessian, expected_hessian.to(hessian))
    torch._dynamo.reset()
    compiled = torch.compile(dbp.decor_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, R, b), expected)


@pytest.mark.parametrize("dims", [{"weight": [0]}, {"weight": [1], "x": [1], "R": [0, 1]}], ids=str)
def test_sizes_of_layers_may_stay_dynamic_in_an_export(dims):
    class Model(torch.nn.Module):
        def forward(self, x, weight, R):
            return torch.ops.dbp.decor_linear(x, weight, R, None)

    arguments = {"x": random((3, 16)), "weight": random((5, 16)), "R": near_identity(1, 16)}
    size = torch.export.Dim("size", min=2)
    dynamic = {k: dict.fromkeys(dims.get(k, ()), size) for k in arguments}
    program = torch.export.export(Model(), (), arguments, dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(**arguments), Model()(**arguments))


# --------------------------------------------------------------------------- padding


@settings(max_examples=80)
@given(
    cases(),
    st.sampled_from(["same", "valid", "int", "tuple"]),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    st.booleans(),
)
def test_padding_strings_and_modes(c, kind, mode, batched):
    dims = len(c.size)
    x = c.input() if batched else c.input()[0]
    stride = (1,) * dims if kind == "same" else c.stride
    spans = [d * (k - 1) for k, d in zip(c.kernel, c.dilation)]
    if kind == "same":
        pairs, padding = [(s // 2, s - s // 2) for s in spans], "same"
    elif kind == "valid":
        pairs, padding = [(0, 0)] * dims, "valid"
    else:
        p = 1 if kind == "int" else tuple(range(dims))
        pairs, padding = [(v, v) for v in ((p,) * dims if kind == "int" else p)], p
    limit = {"zeros": 99, "replicate": 99, "reflect": -1, "circular": 0}[mode]
    if any(max(pair) > size + limit for pair, size in zip(pairs, c.size)):
        return  # torch's F.pad refuses
    if any(size + sum(pair) <= span for size, pair, span in zip(c.size, pairs, spans)):
        return  # does not fit
    flat = [v for pair in reversed(pairs) for v in pair]
    padded = F.pad(c.input(), flat, mode="constant" if mode == "zeros" else mode)
    zero = [0] * dims
    arguments = (list(c.kernel), list(stride), zero, list(c.dilation), c.groups)
    named = {
        "stride": stride,
        "padding": padding,
        "dilation": c.dilation,
        "groups": c.groups,
        "padding_mode": mode,
    }
    if not batched:
        padded = padded[:1]
    R = c.R()
    S = dbp.patch_gram(x, c.kernel, **named)
    assert moment_error(S, reference.patch_gram(padded, *arguments)) <= 1e-12
    m = dbp.patch_mean(x, c.kernel, **named)
    assert error(m, reference.patch_mean(padded, *arguments)) < 1e-10
    white = dbp.decorrelate(x, R, c.kernel, **named)
    expected = reference.decorrelate(padded, R, *arguments)
    assert error(white, expected if batched else expected[0]) < 1e-12
    C, V = dbp.decor_stats(x, R, c.kernel, **named)
    C_expected, V_expected = reference.decor_stats(padded, R, *arguments)
    scale = 1 + V_expected.abs().max()
    assert (C - C_expected).abs().max() < 1e-12 * scale
    assert (V - V_expected).abs().max() < 1e-12 * scale
    R_new, loss = dbp.decor_update(x, R, c.kernel, lr=0.1, rule="normalized", **named)
    R_expected, loss_expected = reference.decor_update(
        padded, R, *arguments, 0.1, 0.5, "normalized"
    )
    assert error(R_new, R_expected) < 1e-10
    assert abs(loss - loss_expected) < 1e-10 * scale**2
    weight = random((c.groups, c.channels // c.groups, *c.kernel), seed=2)
    y = DECOR[dims](x, weight, R, None, **named)
    plain = PLAIN[dims](padded, condensed(weight, R, c.groups), None, *arguments[1:])
    assert error(y, plain if batched else plain[0]) < 1e-12


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_is_torchs_same(kernel, dilation):
    x, weight = random((2, 3, 8, 9)), random((4, 3, kernel, kernel), seed=2)
    eye = torch.eye(3 * kernel**2, dtype=F64)
    y = dbp.decor_conv2d(x, weight, eye, padding="same", dilation=dilation)
    plain = F.conv2d(x, weight, padding="same", dilation=dilation)
    assert y.shape[2:] == x.shape[2:]
    assert error(y, plain) < 1e-13


def test_ints_tuples_and_defaults():
    x = random((2, 4, 8, 8))
    expected = reference.patch_gram(x, [3, 3], [1, 1], [0, 0], [1, 1], 1)
    assert moment_error(dbp.patch_gram(x, 3), expected) < 1e-12
    assert moment_error(dbp.patch_gram(x, (3, 3), (1,), [0], 1), expected) < 1e-12
    assert (
        moment_error(dbp.patch_gram(x, kernel_size=3, stride=1, padding="valid"), expected) < 1e-12
    )
    unbatched = dbp.patch_gram(x[0], (3, 3))
    assert moment_error(unbatched, dbp.patch_gram(x[:1], 3)) < 1e-12
    # an int kernel_size means input.dim() - 2 spatial dimensions
    assert dbp.patch_gram(x[0], 3).shape == (1, 24, 24)
    assert dbp.patch_gram(x, ()).shape == (1, 8, 8)
    assert dbp.patch_gram(random((2, 4, 3, 3, 3)), 2).shape == (1, 32, 32)


@pytest.mark.parametrize("kernel", [(), 1, 3])
def test_empty_batch(kernel):
    x = torch.empty((0, 5)) if kernel == () else torch.empty(0, 5, 8, 8)
    d = 5 * (kernel or 1) ** 2
    R = torch.randn(d, d)
    assert torch.equal(dbp.patch_gram(x, kernel), torch.zeros(1, d, d))
    assert torch.equal(dbp.patch_mean(x, kernel), torch.zeros(1, d))
    C, V = dbp.decor_stats(x, R, kernel)
    assert torch.equal(C, torch.zeros(1, d, d))
    assert torch.equal(V, -torch.ones(1, d))
    for rule, demean in itertools.product(("standard", "normalized"), (False, True)):
        R_new, loss = dbp.decor_update(x, R, kernel, lr=1.0, rule=rule, demean=demean)
        assert torch.equal(R_new, R)
        assert R_new.data_ptr() != R.data_ptr()
        assert loss.shape == ()
        assert loss.item() == 0


def test_update_reaches_a_white_second_moment():
    """Many small steps, as in training: the loss falls and R S R^T approaches the identity."""
    x = random((8, 2, 10, 10))
    R = torch.eye(18, dtype=F64)
    first = None
    for _ in range(400):
        R, loss = dbp.decor_update(x, R, 3, padding=1, lr=0.05)
        first = loss.item() if first is None else first
    assert loss.item() < 1e-3 * first
    assert error(R @ dbp.patch_gram(x, 3, padding=1)[0] @ R.T, torch.eye(18, dtype=F64)) < 0.05


# --------------------------------------------------------------------------- torch's own samples

NAMES = {
    "nn.functional.conv1d": dbp.decor_conv1d,
    "nn.functional.conv2d": dbp.decor_conv2d,
    "nn.functional.conv3d": dbp.decor_conv3d,
    "nn.functional.conv_transpose2d": dbp.decor_conv_transpose2d,
    "nn.functional.linear": dbp.decor_linear,
}
OPS = [op for op in op_db if op.name in NAMES]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def test_opinfos_are_there():
    assert {op.name for op in OPS} == set(NAMES)
    for op in OPS:
        samples = list(op.sample_inputs("cpu", F64))
        assert len(samples) >= 10
        if "linear" not in op.name:
            assert any(s.input.dim() == s.args[0].dim() - 1 for s in samples)  # unbatched
    strings = [s.kwargs.get("padding") for op in OPS for s in op.sample_inputs("cpu", F64)]
    assert {"same", "valid"} <= {s for s in strings if isinstance(s, str)}


@every_op
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_opinfo_samples(op, dtype):
    ours = NAMES[op.name]
    transposed = "transpose" in op.name
    for sample in op.sample_inputs("cpu", dtype):
        x, (weight, *bias), named = sample.input, sample.args, sample.kwargs
        groups = named.get("groups", 1)
        dim = weight.shape[0] // groups if transposed else weight[0].numel()
        eye = torch.eye(dim, dtype=dtype).expand(groups, -1, -1)
        plain = op(x, weight, *bias, **named)
        result = ours(x, weight, eye, *bias, **named)
        assert result.dtype == plain.dtype
        assert error(result, plain) < (1e-13 if dtype == F64 else 1e-5), sample
        R = near_identity(groups, dim, dtype)
        A = (condensed_transposed if transposed else condensed)(weight, R, groups)
        result, plain = ours(x, weight, R, *bias, **named), op(x, A, *bias, **named)
        assert error(result, plain) < (1e-12 if dtype == F64 else 1e-5), sample


@pytest.mark.parametrize(
    "op", [op for op in OPS if "transpose" not in op.name], ids=lambda op: op.name
)
def test_opinfo_samples_through_the_statistics(op):
    """Patches found by asking torch's convolution itself: its response to one-hot weights."""
    for sample in op.sample_inputs("cpu", F64):
        x, (weight, *_), named = sample.input.detach(), sample.args, sample.kwargs
        groups, kernel = named.get("groups", 1), tuple(weight.shape[2:])
        dim, dims = weight[0].numel(), weight.dim() - 2
        one_hot = torch.eye(dim, dtype=F64).repeat(groups, 1).reshape(-1, *weight.shape[1:])
        if dims:
            maps = op(x, one_hot, None, **named)
            maps = maps if x.dim() == dims + 2 else maps[None]
            z = maps.unflatten(1, (groups, dim)).transpose(0, 1).movedim(2, -1).flatten(1, -2)
        else:
            z = x.reshape(1, -1, dim)
        n = z.shape[1]
        S = dbp.patch_gram(x, kernel, **named)
        assert moment_error(S, z.mT @ z / max(1, n)) <= 1e-12, sample
        assert error(dbp.patch_mean(x, kernel, **named), z.sum(1) / max(1, n)) < 1e-11, sample
        R = near_identity(groups, dim)
        R_new, loss = dbp.decor_update(x, R, kernel, lr=0.1, **named)
        flat = z.transpose(0, 1).reshape(n, groups * dim)
        expected = reference.decor_update(flat, R, [], [], [], [], groups, 0.1, 0.5)
        assert error(R_new, expected[0]) < 1e-10, sample
        assert error(loss, expected[1]) < 1e-10, sample


@pytest.mark.parametrize("op", [op for op in OPS if op.error_inputs_func], ids=lambda op: op.name)
def test_opinfo_error_inputs(op):
    """What torch refuses we refuse, whatever R, and with an error of the same kind."""
    count = 0
    for bad in op.error_inputs("cpu"):
        x, (weight, *bias), named = (
            bad.sample_input.input,
            *[bad.sample_input.args],
            bad.sample_input.kwargs,
        )
        with pytest.raises(bad.error_type):
            op(x, weight, *bias, **named)
        groups = max(1, named.get("groups", 1))
        dim = weight[0].numel()
        R = torch.eye(dim, dtype=x.dtype).expand(groups, -1, -1)
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            NAMES[op.name](x, weight, R, *bias, **named)
        count += 1
    assert count >= 8


# --------------------------------------------------------------------------- condensed weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_condensed_weight_is_formed_in_the_precision_of_R(dtype, groups):
    weight = random((4, 6, 3, 3), dtype, seed=2)
    R = near_identity(groups, 54, torch.float32)
    A = dbp.condensed_weight(weight, R, groups)
    expected = condensed(weight.double(), R.double(), groups)
    assert (A.dtype, A.shape) == (dtype, weight.shape)
    # one rounding of the float32 product, not a product of rounded factors
    one_rounding = error(expected.to(dtype), expected)
    assert error(A, expected) <= one_rounding * 1.01 + 1e-6
    transposed = dbp.condensed_weight_transposed(
        weight.transpose(0, 1), near_identity(groups, 6 // groups, torch.float32), groups
    )
    assert transposed.dtype == dtype
    assert transposed.shape == (6, 4, 3, 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_condensed_weight_values(groups):
    weight = random((4, 2, 3), seed=2)
    R = near_identity(groups, 6)
    assert error(dbp.condensed_weight(weight, R, groups), condensed(weight, R, groups)) < 1e-14
    R = near_identity(groups, 4 // groups)
    ours = dbp.condensed_weight_transposed(weight, R, groups)
    assert error(ours, condensed_transposed(weight, R, groups)) < 1e-14
    torch.autograd.gradcheck(
        lambda w, r: dbp.condensed_weight_transposed(w, r, groups), leaves(weight, R)
    )


# --------------------------------------------------------------------------- errors

X2, W2, R2 = random((1, 4, 8, 8)), random((6, 4, 3, 3), seed=2), near_identity(1, 36)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: dbp.patch_gram(X2, 3, padding="some"), ValueError, ["padding='some'", "'same'"]),
        (lambda: dbp.patch_gram(X2, 3, 2, "same"), ValueError, ["padding='same'", "stride=2"]),
        (lambda: dbp.patch_gram(X2, 3, padding=-1), ValueError, ["padding=-1"]),
        (lambda: dbp.patch_gram(X2, 3, padding=(1, -1)), ValueError, ["padding=(1, -1)"]),
        (lambda: dbp.patch_gram(X2, 3, padding=(1, 1, 1)), ValueError, ["padding=(1, 1, 1)", "2"]),
        (lambda: dbp.patch_gram(X2, 3, stride=(1, 2, 3)), ValueError, ["stride=(1, 2, 3)", "2"]),
        (lambda: dbp.patch_gram(X2, 3, stride=0), ValueError, ["stride", "0"]),
        (lambda: dbp.patch_gram(X2, 3, dilation=0), ValueError, ["dilation", "0"]),
        (lambda: dbp.patch_gram(X2, 0), ValueError, ["kernel_size", "0"]),
        (lambda: dbp.patch_gram(X2, (5, 3, 3)), RuntimeError, ["Kernel size", "greater"]),
        (lambda: dbp.patch_gram(X2, (3,)), ValueError, ["input", "(1, 4, 8, 8)"]),
        (lambda: dbp.patch_gram(X2[0, 0], 3), ValueError, ["input", "(8, 8)"]),
        (lambda: dbp.patch_gram(X2, 3, groups=3), ValueError, ["groups=3", "4"]),
        (lambda: dbp.patch_gram(X2, 3, groups=0), ValueError, ["groups=0"]),
        (
            lambda: dbp.patch_gram(X2, 3, padding_mode="mirror"),
            ValueError,
            ["padding_mode='mirror'"],
        ),
        (
            lambda: dbp.patch_gram(X2, 9),
            RuntimeError,
            ["Kernel size", "greater", "actual input size"],
        ),
        (lambda: dbp.patch_gram(X2, 3.0), TypeError, ["kernel_size=3.0"]),
        (lambda: dbp.patch_gram(X2, (3.0, 3)), TypeError, ["kernel_size=(3.0, 3)"]),
        (lambda: dbp.patch_gram(X2, "33"), TypeError, ["kernel_size='33'"]),
        (lambda: dbp.patch_gram(X2, 3, padding=1.5), TypeError, ["padding=1.5", "int"]),
        (lambda: dbp.patch_gram(X2, 3, padding=None), TypeError, ["padding=None"]),
        (lambda: dbp.patch_gram(X2, 3, stride=None), TypeError, ["stride=None"]),
        (lambda: dbp.decor_conv2d(X2, W2, R2, dilation=2.0), TypeError, ["dilation=2.0"]),
        (lambda: dbp.patch_gram(X2[:, :, :0], 3, 1, 2), RuntimeError, ["input", "(1, 4, 0, 8)"]),
        (lambda: dbp.decor_update(X2[:, :, :0], R2, 3, 1, 2, lr=1.0), RuntimeError, ["input"]),
        (lambda: dbp.patch_gram(X2.long(), 3), TypeError, ["input", "int64", "floating"]),
        (lambda: dbp.patch_gram(X2 + 0j, 3), TypeError, ["input", "complex"]),
        (lambda: dbp.patch_mean(X2 + 0j, 3), TypeError, ["input", "complex"]),
        (lambda: dbp.decor_stats(X2 + 0j, R2, 3), TypeError, ["input", "complex"]),
        (lambda: dbp.decor_stats(X2, R2 + 0j, 3), TypeError, ["R", "complex"]),
        (lambda: dbp.decor_update(X2 + 0j, R2, 3, lr=0.1), TypeError, ["input", "complex"]),
        (lambda: dbp.decor_update(X2, R2 + 0j, 3, lr=0.1), TypeError, ["R", "complex"]),
        (
            lambda: dbp.decor_update(X2, R2.half(), 3, lr=0.1),
            TypeError,
            ["R", "float16", "float32"],
        ),
        (lambda: dbp.decor_update(X2, R2.bfloat16(), 3, lr=0.1), TypeError, ["R", "bfloat16"]),
        (lambda: dbp.decor_update(X2, R2, 3, lr=-0.1), ValueError, ["lr=-0.1"]),
        (lambda: dbp.decor_update(X2, R2, 3, lr=float("nan")), ValueError, ["lr=nan"]),
        (lambda: dbp.decor_update(X2, R2, 3, lr=float("inf")), ValueError, ["lr=inf"]),
        (lambda: dbp.decor_update(X2, R2, 3, lr=0.1, kappa=1.5), ValueError, ["kappa=1.5"]),
        (lambda: dbp.decor_update(X2, R2, 3, lr=0.1, kappa=-0.5), ValueError, ["kappa=-0.5"]),
        (
            lambda: dbp.decor_update(X2, R2, 3, lr=0.1, rule="x"),
            ValueError,
            ["rule='x'", "standard"],
        ),
        (lambda: dbp.decor_update(X2[:0], R2, 3, lr=0.1, rule="x"), ValueError, ["rule='x'"]),
        (lambda: dbp.decor_update(X2, R2[1:], 3, lr=0.1), ValueError, ["R", "(35, 36)", "36"]),
        (lambda: dbp.decor_update(X2, R2, 3, groups=2, lr=0.1), ValueError, ["R", "(2, 18, 18)"]),
        (lambda: dbp.decor_stats(X2, R2[:, 1:], 3), ValueError, ["R", "(36, 35)", "(36, 36)"]),
        (lambda: dbp.decor_stats(X2, R2.flatten(), 3), ValueError, ["R", "(1296,)"]),
        (lambda: dbp.decorrelate(X2, R2[None, None], 3), ValueError, ["R", "(1, 1, 36, 36)"]),
        (lambda: dbp.decorrelate(X2, R2, 3, groups=0), ValueError, ["groups=0", "4"]),
        (lambda: dbp.decorrelate(X2, R2, 3, groups=3), ValueError, ["groups=3", "4"]),
        (lambda: dbp.decorrelate(X2, R2, (), groups=3), ValueError, ["groups=3", "8"]),
        (lambda: dbp.decor_conv2d(X2, W2, R2[1:]), ValueError, ["R", "(35, 36)", "(36, 36)"]),
        (lambda: dbp.decor_conv2d(X2, W2, R2.expand(2, 36, 36)), ValueError, ["R", "(2, 36, 36)"]),
        (lambda: dbp.decor_conv2d(X2, W2[0], R2), ValueError, ["weight", "(4, 3, 3)"]),
        (lambda: dbp.decor_conv2d(X2[0, 0], W2, R2), ValueError, ["input", "(8, 8)"]),
        (lambda: dbp.decor_conv2d(X2, W2, R2, stride=2, padding="same"), ValueError, ["same"]),
        (lambda: dbp.decor_conv2d(X2, W2, R2, padding="full"), ValueError, ["padding='full'"]),
        (lambda: dbp.decor_conv2d(X2, W2, R2, stride=(1, 1, 1)), ValueError, ["stride=(1, 1, 1)"]),
        (lambda: dbp.decor_conv_transpose2d(X2[0, 0], W2, R2), ValueError, ["input", "(8, 8)"]),
        (lambda: dbp.decor_conv_transpose2d(X2, W2[:4], R2), ValueError, ["R", "(4, 4)"]),
        (lambda: dbp.decor_linear(X2[0, 0], W2.flatten(1), R2), RuntimeError, ["shapes"]),
        (lambda: dbp.decor_linear(random((2, 36)), W2.flatten(1), R2[1:]), ValueError, ["R", "35"]),
        (lambda: dbp.condensed_weight(W2, R2[1:]), ValueError, ["R", "(35, 36)", "(36, 36)"]),
        (lambda: dbp.condensed_weight(W2, R2.long()), TypeError, ["R", "int64"]),
        (lambda: dbp.condensed_weight_transposed(W2, R2), ValueError, ["R", "(36, 36)", "(6, 6)"]),
        (lambda: dbp.condensed_weight(W2, R2.expand(4, 36, 36), 4), ValueError, ["groups=4", "6"]),
        (lambda: dbp.condensed_weight(W2, R2, 0), ValueError, ["groups=0", "6"]),
        (lambda: dbp.condensed_weight_transposed(W2, R2, 0), ValueError, ["groups=0", "6"]),
        (lambda: dbp.condensed_weight_transposed(W2, R2, 4), ValueError, ["groups=4", "6"]),
    ],
)
def test_errors_name_the_argument(call, kind, words):
    before = X2.clone(), W2.clone(), R2.clone()
    with pytest.raises(kind) as info:
        call()
    for word in words:
        assert word in str(info.value)
    for tensor, copy in zip((X2, W2, R2), before):
        assert torch.equal(tensor, copy)


def test_device_of_R():
    with pytest.raises(ValueError, match="R is on meta: expected the input's device cpu"):
        dbp.ops.decor_stats(X2, R2.to("meta"), [3, 3], [1, 1], [0, 0], [1, 1], 1)


def test_rows_errors():
    with pytest.raises(ValueError, match="groups=2"):
        dbp.patch_gram(random((3, 5)), (), groups=2)
    with pytest.raises(ValueError, match="R has shape"):
        dbp.decor_update(random((3, 5)), near_identity(1, 4), (), lr=0.1)
    assert dbp.patch_gram(rows((3, 5)).input(), ()).shape == (1, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_dtypes_of_results(dtype):
    x, R = random((2, 2, 5, 5), dtype), near_identity(1, 18, torch.float32)
    statistics = F64 if dtype == F64 else torch.float32
    assert dbp.patch_gram(x, 3).dtype == statistics
    assert dbp.patch_mean(x, 3).dtype == statistics
    assert {t.dtype for t in dbp.decor_stats(x, R, 3)} == {statistics}
    assert {t.dtype for t in dbp.decor_stats(x, R.double(), 3)} == {F64}
    assert {t.dtype for t in dbp.decor_update(x, R, 3, lr=0.1)} == {torch.float32}
    assert {t.dtype for t in dbp.decor_update(x, R.double(), 3, lr=0.1)} == {F64}
    assert dbp.decorrelate(x, R, 3).dtype == dtype
    assert dbp.decor_conv2d(x, random((4, 2, 3, 3), dtype), R).dtype == dtype
    assert dbp.decor_linear(x, random((3, 5), dtype), near_identity(1, 5, F64)).dtype == dtype


def test_a_wrong_groups_is_refused_and_spoils_no_later_call():
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises((TypeError, RuntimeError), match="groups"):
        dbp.patch_gram(x, 3, groups=2.0)
    assert dbp.patch_gram(x, 3, groups=2).shape == (2, 18, 18)
    assert dbp.patch_mean(x, 3, groups=2).shape == (2, 18)


def test_a_dispatch_mode_and_a_trace_see_the_op_itself():
    """patch_gram calls its implementation only where nobody is watching the dispatcher."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 5, 5)
    with Watch():
        dbp.patch_gram(x, 3)
    assert seen == [torch.ops.dbp.patch_gram.default]
    traced = torch.jit.trace(lambda x: dbp.patch_gram(x, 3), x)
    assert "dbp::patch_gram" in str(traced.graph)
