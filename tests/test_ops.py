"""torch.ops.dbp: opcheck, gradients, transforms, compilation, autocast, fake tensors, backends."""

import itertools
import shutil
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from helpers import Case, case, error, moment_error, random, rows
from torch._subclasses import FakeTensorMode

import dbp_kernels as dbp
from dbp_kernels import backends, ops, reference

F64 = torch.float64
dbp_ops = torch.ops.dbp

CASES = {
    "2d": case(2, 2, (5, 4), 3, padding=1),
    "2d strided": case(2, 4, (7, 6), (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=2),
    "1x1": case(2, 3, (4, 4), 1),
    "1d": case(2, 2, (8,), 3, padding=1),
    "3d": case(1, 2, (3, 4, 3), 2, padding=1),
    "rows": rows((4, 3)),
    "rows with groups": rows((2, 3, 4), groups=2),
    "no images": case(0, 2, (5, 4), 3, padding=1),
}
every_case = pytest.mark.parametrize("c", CASES.values(), ids=CASES.keys())
OPAQUE = ("patch_gram", "patch_mean", "decor_stats", "decor_update")


def opaque_arguments(name: str, c: Case, dtype=F64, grad: bool = False) -> tuple:
    x = c.input(dtype).requires_grad_(grad)
    if name in ("patch_gram", "patch_mean"):
        return (x, *c.arguments)
    R = c.R(F64 if dtype == F64 else torch.float32, flat=True).requires_grad_(grad)
    if name == "decor_stats":
        return (x, R, *c.arguments)
    return (x, R, *c.arguments, 0.1, 0.5, "normalized", True)


def composite_arguments(c: Case, dtype=F64, grad: bool = False) -> dict[str, tuple]:
    """Arguments for the composites that this case's input suits."""

    def leaf(t):
        return t.requires_grad_(grad)

    x, R = leaf(c.input(dtype)), leaf(c.R(dtype, flat=True))
    arguments = {"decorrelate": (x, R, *c.arguments)}
    dims = len(c.kernel)
    if dims:
        weight = leaf(random((2 * c.groups, c.channels // c.groups, *c.kernel), dtype, 2))
        bias = leaf(random((2 * c.groups,), dtype, 3))
        kernel_free = c.arguments[1:]
        arguments[f"decor_conv{dims}d"] = (x, weight, R, bias, *kernel_free)
    elif c.groups == 1:
        weight, bias = leaf(random((2, c.channels), dtype, 2)), leaf(random((2,), dtype, 3))
        arguments["decor_linear"] = (x, weight, R, bias)
    if dims == 2:
        pixel = c.channels // c.groups
        Rt = leaf(torch.eye(pixel, dtype=dtype) + random((c.groups, pixel, pixel), dtype, 4))
        weight = leaf(random((c.channels, 2, *c.kernel), dtype, 2))
        arguments["decor_conv_transpose2d"] = (
            x,
            weight,
            Rt,
            None,
            list(c.stride),
            list(c.padding),
            [s - 1 for s in c.stride],
            c.groups,
            list(c.dilation),
        )
    return arguments


ALL = (
    *OPAQUE,
    "decorrelate",
    "decor_conv1d",
    "decor_conv2d",
    "decor_conv3d",
    "decor_conv_transpose2d",
    "decor_linear",
)


def calls(c: Case, dtype=F64, grad: bool = False):
    """(name, arguments) of every op that suits this case."""
    for name in OPAQUE:
        yield name, opaque_arguments(name, c, dtype, grad)
    yield from composite_arguments(c, dtype, grad).items()


# --------------------------------------------------------------------------- definitions


def test_every_schema_is_registered_and_exercised():
    names = [schema.split("(")[0] for schema in ops.SCHEMAS]
    assert sorted(names) == sorted(ALL)
    assert {name for c in CASES.values() for name, _ in calls(c)} == set(ALL)
    for name in names:
        assert torch.Tag.pt2_compliant_tag in getattr(dbp_ops, name).default.tags


@pytest.mark.parametrize("name", ALL)
def test_composites_have_no_kernel_of_their_own(name):
    """With one they would lose their gradient silently."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    opaque = name in OPAQUE
    assert has(f"dbp::{name}", "CompositeImplicitAutograd") != opaque
    assert has(f"dbp::{name}", "CompositeExplicitAutograd") == opaque
    assert has(f"dbp::{name}", "FuncTorchBatchedDecomposition") != opaque
    for key in ("CPU", "CUDA"):
        assert opaque or not has(f"dbp::{name}", key)


# --------------------------------------------------------------------------- opcheck


@every_case
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires grad"])
def test_opcheck(c, grad):
    for name, arguments in calls(c, torch.float32, grad):
        torch.library.opcheck(getattr(dbp_ops, name).default, arguments)


@pytest.mark.parametrize("name", OPAQUE)
def test_opcheck_other_dtypes_and_strides(name):
    c = CASES["2d"]
    op = getattr(dbp_ops, name).default
    for dtype in (F64, torch.bfloat16):
        torch.library.opcheck(op, opaque_arguments(name, c, dtype))
    for layout in ("channels_last", "sliced"):
        _, *rest = opaque_arguments(name, c)
        torch.library.opcheck(op, (c.input(layout=layout), *rest))


# --------------------------------------------------------------------------- nothing is changed


@every_case
def test_inputs_are_not_touched(c):
    for name, arguments in calls(c):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        before = [(t.clone(), t._version) for t in tensors]
        results = getattr(dbp_ops, name)(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        for t, (values, version) in zip(tensors, before):
            assert torch.equal(t, values), name
            assert t._version == version, name
        storages = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        for result in results:
            assert not result.numel() or result.untyped_storage().data_ptr() not in storages, name
            assert name not in OPAQUE or result.is_contiguous()


def test_inputs_are_not_touched_on_error():
    c = CASES["2d"]
    x, R = c.input(), c.R()
    before = x.clone(), R.clone()
    for bad in ({"lr": -1.0}, {"kappa": 2.0}, {"rule": "x"}, {"groups": 3}):
        named = {"lr": 0.1} | bad
        with pytest.raises(ValueError, match=next(iter(bad))):
            dbp.decor_update(x, R, 3, padding=1, **named)
    assert torch.equal(x, before[0])
    assert torch.equal(R, before[1])
    assert (x._version, R._version) == (0, 0)


# --------------------------------------------------------------------------- gradients

SMALL = {
    "1d": case(2, 2, (5,), 3, padding=1),
    "2d": case(2, 1, (4, 3), 2, padding=1),
    "2d strided": case(1, 2, (6, 5), 2, stride=2, padding=1, dilation=2, groups=2),
    "2d, pixels unread": case(2, 1, (6, 6), 2, stride=(4, 3)),
    "3d": case(1, 1, (2, 3, 2), 2, padding=1),
    "rows": rows((3, 2)),
    "rows with groups": rows((2, 2, 4), groups=2),
}
every_small_case = pytest.mark.parametrize("c", SMALL.values(), ids=SMALL.keys())


@every_small_case
@pytest.mark.parametrize("name", ["patch_gram", "patch_mean", "decor_stats"])
def test_gradcheck(name, c):
    op = getattr(dbp_ops, name)
    arguments = opaque_arguments(name, c, grad=True)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    rest = arguments[len(tensors) :]
    torch.autograd.gradcheck(lambda *t: op(*t, *rest), tensors)
    torch.autograd.gradgradcheck(lambda *t: op(*t, *rest), tensors)


@every_small_case
@pytest.mark.parametrize("name", ["patch_gram", "patch_mean", "decor_stats"])
def test_gradients_are_those_of_the_definition(name, c):
    arguments = opaque_arguments(name, c, grad=True)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]

    def gradients(function):
        results = function(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        loss = sum((r * random(r.shape, seed=9 + i)).sum() for i, r in enumerate(results))
        return torch.autograd.grad(loss, tensors)

    for ours, expected in zip(
        gradients(getattr(dbp_ops, name)), gradients(getattr(reference, name))
    ):
        assert error(ours, expected) < 1e-12


def test_gradients_in_low_precision_have_the_dtype_of_the_input():
    for dtype, name in itertools.product((torch.bfloat16, torch.float16), OPAQUE[:3]):
        arguments = opaque_arguments(name, SMALL["2d"], dtype, grad=True)
        result = getattr(dbp_ops, name)(*arguments)
        result = result[0] + result[1].unsqueeze(-1) if isinstance(result, tuple) else result
        result.square().sum().backward()
        assert arguments[0].grad.dtype == dtype
        assert arguments[0].grad.isfinite().all()


def test_gradient_of_the_input_alone_and_of_R_alone():
    c = SMALL["2d"]
    x, R = c.input(), c.R()
    both = []
    for x_grad, R_grad in ((True, False), (False, True), (True, True)):
        xs, Rs = x.clone().requires_grad_(x_grad), R.clone().requires_grad_(R_grad)
        C, V = dbp_ops.decor_stats(xs, Rs, *c.arguments)
        (C.square().sum() + V.sum()).backward()
        both.append((xs.grad, Rs.grad))
    assert both[0][1] is None
    assert both[1][0] is None
    assert torch.equal(both[0][0], both[2][0])
    assert torch.equal(both[1][1], both[2][1])


def test_gradients_of_no_images():
    c = CASES["no images"]
    for name in OPAQUE[:3]:
        arguments = opaque_arguments(name, c, grad=True)
        result = getattr(dbp_ops, name)(*arguments)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
        assert arguments[0].grad.shape == c.shape


def test_the_update_has_no_gradient():
    arguments = opaque_arguments("decor_update", CASES["2d"], grad=True)
    R_new, loss = dbp_ops.decor_update(*arguments)
    assert not R_new.requires_grad
    assert not loss.requires_grad


@pytest.mark.parametrize("name", OPAQUE)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires grad"])
def test_forward_mode_raises(name, grad):
    """Rather than returning a tangent of zero."""
    arguments = opaque_arguments(name, CASES["2d"], grad=grad)
    x, *rest = arguments
    op = getattr(dbp_ops, name)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError):
            op(dual, *rest)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda x: op(x, *rest), (x.detach(),), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError):
        torch.func.jacfwd(lambda x: op(x, *rest))(x.detach())
    if name in ("decor_stats", "decor_update"):
        R, *after = rest
        with pytest.raises(NotImplementedError):
            torch.func.jvp(
                lambda R: op(x.detach(), R, *after), (R.detach(),), (torch.ones_like(R),)
            )


# --------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("name", ["patch_gram", "patch_mean", "decor_stats"])
def test_torch_func_on_opaque_ops(name):
    c = SMALL["2d"]
    x, *rest = opaque_arguments(name, c)

    def ours(x):
        result = getattr(dbp_ops, name)(x, *rest)
        return result[0] + torch.diag_embed(result[1]) if isinstance(result, tuple) else result

    def definition(x):
        result = getattr(reference, name)(x, *rest)
        return result[0] + torch.diag_embed(result[1]) if isinstance(result, tuple) else result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the batching fallback is allowed here
        assert error(torch.func.jacrev(ours)(x), torch.func.jacrev(definition)(x)) < 1e-12
        many = random((3, *x.shape), seed=7)
        batched = torch.func.vmap(ours)(many)
        assert error(batched, torch.stack([definition(one) for one in many])) < 1e-12
        loss = lambda x: ours(x).square().sum()  # noqa: E731
        expected = lambda x: definition(x).square().sum()  # noqa: E731
        assert error(torch.func.grad(loss)(x), torch.func.grad(expected)(x)) < 1e-12
        per_sample = torch.func.vmap(torch.func.grad(loss))(many)
        by_loop = torch.stack([torch.func.grad(expected)(one) for one in many])
        assert error(per_sample, by_loop) < 1e-12


def test_vmap_of_the_update():
    """Ensembles: many R over one input."""
    c = CASES["1d"]
    x = c.input()
    many = torch.stack([c.R(seed=s) for s in range(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        R_new, loss = torch.func.vmap(lambda R: dbp_ops.decor_update(x, R, *c.arguments, 0.1, 0.5))(
            many
        )
    for i, R in enumerate(many):
        expected = reference.decor_update(x, R, *c.arguments, 0.1, 0.5)
        assert error(R_new[i], expected[0]) < 1e-12
        assert error(loss[i], expected[1]) < 1e-12


def conv_pair():
    """decor_conv2d and the plain convolution it is equal to, as functions of (x, W, R, b)."""

    def ours(x, weight, R, bias):
        return dbp_ops.decor_conv2d(x, weight, R, bias, [2, 1], [1, 1], [1, 1], 2)

    def plain(x, weight, R, bias):
        A = torch.einsum("goi,gij->goj", weight.reshape(2, 2, -1), R).reshape(weight.shape)
        return F.conv2d(x, A, bias, (2, 1), (1, 1), (1, 1), 2)

    x, weight = random((2, 4, 4, 3)), random((4, 2, 2, 2), seed=2)
    R, bias = torch.eye(8, dtype=F64) + random((2, 8, 8), seed=3) / 3, random((4,), seed=4)
    return ours, plain, (x, weight, R, bias)


@pytest.fixture
def no_fallback():
    """An operator that vmap would run in a loop over the batch raises, or at least warns."""
    enabled = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(enabled)


def test_the_fallback_is_noticed(no_fallback):
    x, *rest = opaque_arguments("patch_gram", CASES["1d"])
    with pytest.raises(RuntimeError, match="fallback"):
        torch.func.vmap(lambda x: dbp_ops.patch_gram(x, *rest))(x[None])


@pytest.mark.usefixtures("no_fallback")
def test_torch_func_on_composites():
    ours, plain, inputs = conv_pair()
    func = torch.func

    def losses(f):
        return lambda *t: f(*t).sin().sum()

    for argnum in range(4):
        for transform in (func.jacrev, func.jacfwd):
            got = transform(ours, argnums=argnum)(*inputs)
            assert error(got, transform(plain, argnums=argnum)(*inputs)) < 1e-11
        got = func.grad(losses(ours), argnums=argnum)(*inputs)
        assert error(got, func.grad(losses(plain), argnums=argnum)(*inputs)) < 1e-11
    tangents = tuple(random(t.shape, seed=20 + i) for i, t in enumerate(inputs))
    for got, want in zip(func.jvp(ours, inputs, tangents), func.jvp(plain, inputs, tangents)):
        assert error(got, want) < 1e-11
    for argnum in (1, 2):
        got = func.hessian(losses(ours), argnums=argnum)(*inputs)
        assert got.abs().max() > 0
        assert error(got, func.hessian(losses(plain), argnums=argnum)(*inputs)) < 1e-11


@pytest.mark.usefixtures("no_fallback")
def test_per_sample_gradients():
    ours, plain, (x, weight, R, bias) = conv_pair()

    def loss(f):
        return lambda x, w, R: f(x[None], w, R, bias).square().sum()

    for argnum in (1, 2):
        got = torch.func.vmap(torch.func.grad(loss(ours), argnums=argnum), (0, None, None))(
            x, weight, R
        )
        for i in range(len(x)):
            want = torch.func.grad(loss(plain), argnums=argnum)(x[i], weight, R)
            assert error(got[i], want) < 1e-12


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize(
    "c", [CASES[n] for n in ("1d", "2d strided", "3d", "rows", "1x1")], ids=str
)
def test_vmap_of_composites(c):
    """Over every tensor argument in turn, and over all together, without the slow fallback."""
    for name, arguments in composite_arguments(c).items():
        op = getattr(dbp_ops, name)
        tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
        for over in [[i] for i in tensors] + [tensors]:
            batched = list(arguments)
            for i in over:
                batched[i] = torch.stack([arguments[i], 2 * arguments[i], arguments[i] - 1])
            in_dims = tuple(0 if i in over else None for i in range(len(arguments)))
            got = torch.func.vmap(op, in_dims=in_dims)(*batched)
            for k in range(3):
                single = [b[k] if i in over else b for i, b in enumerate(batched)]
                assert error(got[k], op(*single)) < 1e-12, (name, over)


# --------------------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("c", [CASES[n] for n in ("2d strided", "3d", "1d", "rows")], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_every_op(c, dynamic):
    for name, arguments in calls(c):
        op = getattr(dbp_ops, name)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *a, op=op: op(*a), fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        got, want = compiled(*arguments), op(*arguments)
        got, want = (r if isinstance(r, tuple) else (r,) for r in (got, want))
        for g, w in zip(got, want):
            assert error(g, w) < 1e-12, name
            assert (g.dtype, g.stride()) == (w.dtype, w.stride()), name


def several(x, weight, R, bias):
    """Uses most ops at once, through the Python functions."""
    y = dbp.decor_conv2d(x, weight, R, bias, padding="same")
    S = dbp.patch_gram(x, 3, padding="same")
    m = dbp.patch_mean(x, 3, padding=1)
    C, V = dbp.decor_stats(x, R, 3, padding=1)
    R_new, loss = dbp.decor_update(x.detach(), R.detach(), 3, padding=1, lr=0.1, demean=True)
    white = dbp.decorrelate(x, R, 3, padding=1)
    return y.sum() + S.sum() + (C.square().sum() + V.sum()) + m.sum() + white.sum(), R_new, loss


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_a_training_step(dynamic):
    """Forward and backward in one graph each; with dynamic shapes, other sizes reuse them."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(several, fullgraph=True, dynamic=dynamic, backend=counter)
    weight, bias = random((4, 2, 3, 3), seed=2), random((4,), seed=3)
    R = case(1, 2, (3, 3), 3).R(flat=True)
    counts = []
    # no two sizes equal: dynamo would take them for one symbol
    for shape in [(5, 2, 13, 11), (6, 2, 7, 10), (8, 2, 9, 14)]:
        x = random(shape)
        results = []
        for function in (several, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, weight, R, bias)]
            total, R_new, loss = function(*leaves)
            total.backward()
            results.append((total.detach(), R_new, loss, *(t.grad for t in leaves)))
        for got, want in zip(results[1], results[0]):
            assert error(got, want) < 1e-11
        counts.append(counter.frame_count)
    assert not dynamic or counts == counts[:1] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor():
    weight, bias = random((4, 2, 3, 3), seed=2), random((4,), seed=3)
    leaves = [
        t.requires_grad_()
        for t in (random((2, 2, 6, 5)), weight, case(1, 2, (3, 3), 3).R(flat=True), bias)
    ]
    compiled = torch.compile(several, fullgraph=True)
    for got, want in zip(compiled(*leaves), several(*leaves)):
        assert error(got.detach(), want.detach()) < 1e-11
    compiled(*leaves)[0].backward()
    gradients = [t.grad.clone() for t in leaves]
    for got, want in zip(gradients, torch.autograd.grad(several(*leaves)[0], leaves)):
        assert error(got, want) < 1e-11


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x, R):
            return dbp.decor_update(x, R, 3, padding=1, lr=0.1), dbp.patch_gram(x, 3)

    c = CASES["2d"]
    arguments = (c.input(), c.R())
    program = torch.export.export(Model(), arguments)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"dbp.decor_update.default", "dbp.patch_gram.default"} <= targets
    (R_new, loss), S = program.module()(*arguments)
    (R_want, loss_want), S_want = Model()(*arguments)
    assert error(R_new, R_want) == error(loss, loss_want) == error(S, S_want) == 0


# --------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("c", [CASES["2d"], CASES["1x1"], CASES["rows"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_leaves_the_statistics_alone(c, dtype):
    """Statistics under autocast are those of the same input without it, in float32."""
    for name in OPAQUE:
        arguments = opaque_arguments(name, c, dtype)
        want = getattr(dbp_ops, name)(*arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = getattr(dbp_ops, name)(*arguments)
        got, want = (r if isinstance(r, tuple) else (r,) for r in (got, want))
        for g, w in zip(got, want):
            assert g.dtype == torch.float32
            assert torch.equal(g, w), name
    x = c.input(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        S = dbp_ops.patch_gram(x, *c.arguments)
    assert moment_error(S, reference.patch_gram(x.double(), *c.arguments)) < 1e-6


def test_autocast_leaves_gradients_of_statistics_alone():
    c = CASES["2d"]
    for name in OPAQUE[:3]:
        grads = []
        for enabled in (False, True):
            arguments = opaque_arguments(name, c, torch.float32, grad=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                result = getattr(dbp_ops, name)(*arguments)
                result = result[0] if isinstance(result, tuple) else result
                loss = (result * random(result.shape, torch.float32, 8)).sum()
                loss.backward()  # under autocast on purpose
            grads.append(arguments[0].grad)
        assert torch.equal(*grads), name


def test_autocast_forms_A_in_float32_and_then_casts():
    c = CASES["2d"]
    x, R = c.input(torch.float32), c.R(torch.float32, flat=True)
    weight, bias = random((4, 2, 3, 3), torch.float32, 2), random((4,), torch.float32, 3)
    A = dbp.condensed_weight(weight, R)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dbp.condensed_weight(weight, R), A)
        y = dbp.decor_conv2d(x, weight, R, bias, padding=1)
        plain = F.conv2d(x, A, bias, padding=1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, plain)
    rounded = F.conv2d(x.bfloat16(), A.bfloat16(), bias.bfloat16(), padding=1)
    assert error(y, rounded.double()) < 2**-7
    z, w, r = random((3, 5), torch.float32), random((4, 5), torch.float32, 2), c.R(torch.float32)
    r = r[0, :5, :5]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = dbp.decor_linear(z, w, r)
        assert linear.dtype == torch.bfloat16
        assert torch.equal(linear, F.linear(z, dbp.condensed_weight(w, r)))
        up = dbp.decor_conv_transpose2d(x, weight.transpose(0, 1), r[:2, :2])
        At = dbp.condensed_weight_transposed(weight.transpose(0, 1), r[:2, :2])
        assert torch.equal(up, F.conv_transpose2d(x, At))


@pytest.mark.usefixtures("fresh_dynamo")
def test_autocast_and_compile():
    c = CASES["2d"]
    x, R = c.input(torch.float32), c.R(torch.float32, flat=True)
    weight = random((4, 2, 3, 3), torch.float32, 2)

    def step(x, weight, R):
        return dbp.decor_conv2d(x, weight, R, padding=1), dbp.patch_gram(x, 3, padding=1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, S = compiled(x, weight, R)
        y_want, S_want = step(x, weight, R)
    assert (y.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(S, S_want)
    assert error(y, y_want) < 2**-6


# --------------------------------------------------------------------------- fake and meta tensors


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_meta_and_fake_tensors(c, dtype):
    for name, arguments in calls(c, dtype):
        op = getattr(dbp_ops, name)
        want = op(*arguments)
        meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        with FakeTensorMode() as mode:
            fake = op(
                *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
            )
        results = [r if isinstance(r, tuple) else (r,) for r in (want, meta, fake)]
        for w, m, f in zip(*results):
            assert w.shape == m.shape == f.shape, name
            assert w.dtype == m.dtype == f.dtype, name
            assert w.stride() == m.stride() == f.stride(), name
            assert (m.device.type, f.device.type) == ("meta", "cpu")


# --------------------------------------------------------------------------- backends


def test_backend_eager():
    x = random((2, 2, 5, 5))
    with dbp.backend("eager"):
        assert backends.requested() == "eager"
        assert backends.select("cpu").__name__ == "dbp_kernels.backends.eager.ops"
        S = dbp.patch_gram(x, 3)
    assert backends.requested() == "auto"
    assert torch.equal(S, dbp.patch_gram(x, 3))


def test_backends_nest_and_unwind():
    with dbp.backend("eager"):
        with dbp.backend("auto"):
            assert backends.requested() == "auto"
        assert backends.requested() == "eager"
        with pytest.raises(ZeroDivisionError), dbp.backend("auto"):
            raise ZeroDivisionError
        assert backends.requested() == "eager"
    assert backends.requested() == "auto"


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"'vulkan'.*'eager'"), dbp.backend("vulkan"):
        pass
    assert backends.requested() == "auto"


def test_unusable_backend_says_so():
    x = random((2, 2, 5, 5))
    unusable = [n for n in backends.NAMES if n != "auto" and backends.unusable(n, "cpu")]
    for name in unusable:
        reason = backends.unusable(name, "cpu")
        with dbp.backend(name), pytest.raises(RuntimeError) as info:
            dbp.patch_gram(x, 3)
        assert repr(name) in str(info.value)
        assert reason in str(info.value)
        with dbp.backend(name):  # composites have no backend
            dbp.decor_linear(x, random((3, 5)), torch.eye(5, dtype=F64))
    assert backends.unusable("eager", "cpu") is None


def test_backend_from_the_environment(monkeypatch):
    x = random((2, 2, 5, 5))
    monkeypatch.setenv("DBP_BACKEND", "eager")
    assert backends.requested() == "eager"
    dbp.patch_gram(x, 3)
    monkeypatch.setenv("DBP_BACKEND", "")
    assert backends.requested() == "auto"
    monkeypatch.setenv("DBP_BACKEND", "vulkan")
    with pytest.raises(ValueError, match=r"DBP_BACKEND='vulkan'"):
        dbp.patch_gram(x, 3)
    with dbp.backend("eager"):  # the context manager comes first
        dbp.patch_gram(x, 3)


# --------------------------------------------------------------------------- the rest


def test_repeated_calls_are_bit_for_bit_equal():
    c = case(4, 8, (12, 12), 3, padding=1)
    for name in OPAQUE:
        arguments = opaque_arguments(name, c, torch.float32)
        first, second = (getattr(dbp_ops, name)(*arguments) for _ in range(2))
        first, second = (r if isinstance(r, tuple) else (r,) for r in (first, second))
        assert all(torch.equal(a, b) for a, b in zip(first, second)), name


def test_inference_mode_and_no_grad():
    c = CASES["2d"]
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            for name, arguments in calls(c):
                result = getattr(dbp_ops, name)(*arguments)
                result = result[0] if isinstance(result, tuple) else result
                assert not result.requires_grad
                assert result.isfinite().all()


def test_single_entries_stand_for_all_axes():
    """As in aten, stride [2] is [2, 2]."""
    x = random((2, 2, 9, 9), seed=4).requires_grad_()
    short = dbp_ops.patch_gram(x, [3, 3], [2], [1], [1], 1)
    full = dbp_ops.patch_gram(x, [3, 3], [2, 2], [1, 1], [1, 1], 1)
    assert torch.equal(short, full)
    (a,) = torch.autograd.grad(short.square().sum(), x)
    (b,) = torch.autograd.grad(full.square().sum(), x)
    assert torch.equal(a, b)
