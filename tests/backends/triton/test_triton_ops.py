"""The whole contract of the ops with the Triton backend: interpreted on the CPU, or on the device."""

import itertools
import weakref

import pytest
import torch
from helpers import (
    DEVICE,
    LAYOUTS,
    Case,
    case,
    cases,
    error,
    moment_error,
    random,
    rows,
    strided,
    updated,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

import dbp_kernels as dbp
from dbp_kernels import backends, choose, reference, rules
from dbp_kernels import nn as dnn
from dbp_kernels.backends.prepared import forget
from dbp_kernels.backends.triton import ops, runtime
from dbp_kernels.planning import planner
from dbp_kernels.planning.choice import Choice

OPAQUE = ("patch_gram", "patch_mean", "decor_stats", "decor_update")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "2d": case(2, 20, (5, 4), 3, padding=1),
    "2d strided": case(2, 4, (7, 6), (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=2),
    "few channels": case(2, 3, (9, 8), 5, stride=2, padding=2),
    "depthwise": case(2, 6, (6, 5), 3, padding=1, groups=6),
    "1x1": case(2, 33, (4, 4), 1),
    "1d": case(2, 5, (12,), 3, padding=1),
    "3d": case(1, 3, (3, 4, 3), 2, padding=1),
    "rows": rows((40, 18)),
    "rows with groups": rows((2, 9, 8), groups=2),
    "no images": case(0, 2, (5, 4), 3, padding=1),
}
every_case = pytest.mark.parametrize("c", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def _triton():
    with dbp.backend("triton"):
        yield


@pytest.fixture
def highest():
    """float32 products in full precision, as by torch's default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


pytestmark = pytest.mark.usefixtures("highest")


def arguments_of(name: str, c: Case, dtype=torch.float32, layout="contiguous", grad=False) -> tuple:
    x = c.input(dtype, layout=layout).to(DEVICE)
    x = x.requires_grad_() if grad else x
    if name in ("patch_gram", "patch_mean"):
        return (x, *c.arguments)
    R = c.R(torch.float32, flat=True).to(DEVICE)
    R = R.requires_grad_() if grad else R
    if name == "decor_stats":
        return (x, R, *c.arguments)
    return (x, R, *c.arguments, 0.1, 0.4, "standard", True)


def several(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def exact(name: str, arguments: tuple) -> tuple:
    """The definition in float64, of the same inputs."""
    high = [a.detach().double() if isinstance(a, torch.Tensor) else a for a in arguments]
    return several(getattr(reference, name)(*high))


def plain(name: str, arguments: tuple) -> tuple:
    """The definition in float32."""
    high = [a.detach().float() if isinstance(a, torch.Tensor) else a for a in arguments]
    return several(getattr(reference, name)(*high))


# --------------------------------------------------------------------------- values


@pytest.mark.usefixtures("poison")
@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPAQUE)
def test_every_op_is_the_definition(name, dtype, c):
    arguments = arguments_of(name, c, dtype)
    got = several(getattr(torch.ops.dbp, name)(*arguments))
    for g, e, p in zip(got, exact(name, arguments), plain(name, arguments)):
        assert g.dtype == torch.float32
        assert error(g, e.reshape(g.shape)) <= 2 * error(p, e) + 1e-6


@pytest.mark.usefixtures("poison")
@settings(max_examples=30)
@given(
    cases(max_channels=6),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from(["triton_shift", "triton_direct"]),
)
def test_every_algorithm_on_any_geometry(c, dtype, layout, name):
    if name == "triton_shift" and not c.kernel:
        return
    x = c.input(dtype, layout=layout).to(DEVICE)
    S = ops.patch_gram(x, c.geometry, Choice(name, 0.0, 0.0))
    assert moment_error(S, reference.patch_gram(x.double(), *c.arguments)) < 1e-5


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ["few channels", "1x1"])
def test_one_shape_in_many_layouts(name):
    """Each of them prepared once, whichever came before; nothing keeps an input alive."""
    c = CASES[name]
    x, R = c.input(torch.bfloat16).to(DEVICE), c.R(torch.float32).to(DEVICE)
    moved = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view_as(x).copy_(x)
    inputs = [strided(x.cpu(), layout).to(DEVICE) for layout in LAYOUTS] + [moved]
    for _ in range(2):
        for one in inputs:
            S = torch.ops.dbp.patch_gram(one, *c.arguments)
            assert moment_error(S, reference.patch_gram(one.double(), *c.arguments)) < 1e-5
            torch.ops.dbp.decor_stats(one, R, *c.arguments)
    alive = weakref.ref(moved)
    del inputs, moved, one
    assert alive() is None


@pytest.mark.parametrize("choice", ["gram", "direct", "samples"])
@pytest.mark.parametrize("demean", [False, True])
def test_every_plan(choice, demean):
    c = case(2, 4, (5, 4), 3, padding=1)
    x, R = c.input(torch.float32).to(DEVICE), c.R(torch.float32).to(DEVICE)
    best = choose.gram_choices(c.geometry, DEVICE.type, x.dtype)[0]
    plan = Choice(choice, 0.0, 0.0, gram=best if choice == "gram" else None)
    rule = 0.1, 0.3, "normalized", demean
    R_new, loss = updated(ops, x, R, c.geometry, *rule, plan)
    expected = reference.decor_update(x.double(), R.double(), *c.arguments, *rule)
    assert error(R_new, expected[0].reshape(R_new.shape)) < 1e-5
    assert error(loss.mean(), expected[1]) < 1e-5


@pytest.fixture
def nothing_prepared():
    """No earlier test's launches in this one, and none of its in later ones."""
    forget()
    yield
    forget()


@pytest.mark.usefixtures("nothing_prepared")
def test_the_planner_takes_the_kernels(monkeypatch):
    taken = []
    for name in ops._OWN:

        def spy(x, g, name=name):
            return lambda x: taken.append(name) or x.new_zeros(1)

        monkeypatch.setitem(ops._OWN, name, spy)
    for channels, expected in ((64, "triton_shift"), (3, "triton_direct")):
        c = case(8, channels, (28, 28), 3, padding=1)
        x = c.input(torch.bfloat16).to(DEVICE)
        dbp.patch_gram(x, 3, padding=1)
        assert taken.pop() == expected
    with dbp.backend("eager"):
        dbp.patch_gram(x, 3, padding=1)
    assert not taken


@pytest.mark.parametrize(
    ("pointers", "tma", "taken"),
    [(1.0, 2.0, "pointers"), (2.0, 1.0, "tma"), (None, 1.0, "pointers")],
)
def test_tensor_descriptors_are_taken_where_they_were_faster(pointers, tma, taken, monkeypatch):
    measured = {"gram_shift": pointers, "gram_shift_tma": tma}
    monkeypatch.setattr(ops.configs, "seconds", lambda kernel, *rest: measured[kernel])
    monkeypatch.setattr(ops.gram_shift, "shift_gram", lambda x, g: "pointers")
    monkeypatch.setattr(ops.gram_shift_tma, "tma_gram", lambda x, g: "tma")
    monkeypatch.setattr(ops.gram_shift_tma, "usable", lambda x, g: x.dtype == torch.bfloat16)
    c = CASES["2d"]
    for dtype in DTYPES:
        expected = taken if dtype == torch.bfloat16 else "pointers"
        assert ops._shift(c.input(dtype), c.geometry) == expected


@pytest.mark.parametrize("name", OPAQUE)
def test_float64_is_left_to_the_eager_backend(name):
    c = CASES["2d"]
    arguments = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments_of(name, c)]
    got = several(getattr(torch.ops.dbp, name)(*arguments))
    with dbp.backend("eager"):
        want = several(getattr(torch.ops.dbp, name)(*arguments))
    assert all(g.dtype == torch.float64 and torch.equal(g, w) for g, w in zip(got, want))


def test_inputs_too_large_for_32_bit_pixel_numbers_are_left_to_the_eager_backend(monkeypatch):
    monkeypatch.setattr(planner, "MAX_PIXELS", 39)
    monkeypatch.setattr(ops, "_OWN", {})
    planner.reset()
    try:
        c = CASES["2d"]
        x = c.input(torch.float32).to(DEVICE)
        names = {choice.name for choice in choose.gram_choices(c.geometry, x.device.type, x.dtype)}
        assert names
        assert not [name for name in names if name.startswith("triton")]
        S = torch.ops.dbp.patch_gram(x, *c.arguments)
        assert moment_error(S, reference.patch_gram(x.double(), *c.arguments)) < 1e-5
    finally:
        planner.reset()


@pytest.mark.parametrize("name", OPAQUE)
def test_repeated_calls_are_bit_for_bit_equal_and_touch_no_input(name):
    c = case(3, 20, (9, 9), 3, padding=1)
    arguments = arguments_of(name, c, torch.bfloat16)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    first, second = (several(getattr(torch.ops.dbp, name)(*arguments)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for a, b in zip(arguments, before):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


# --------------------------------------------------------------------------- torch's machinery


@every_case
@pytest.mark.parametrize("name", OPAQUE)
def test_opcheck(name, c):
    for dtype, grad in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        arguments = arguments_of(name, c, dtype, grad=grad)
        torch.library.opcheck(getattr(torch.ops.dbp, name).default, arguments)


def everything(x, weight, R):
    """Most ops at once, as a training step uses them."""
    y = dbp.decor_conv2d(x, weight, R, padding=1)
    S = dbp.patch_gram(x, 3, padding=1)
    C, V = dbp.decor_stats(x, R, 3, padding=1)
    R_new, loss = dbp.decor_update(x.detach(), R.detach(), 3, padding=1, lr=0.1)
    return y.float().sum() + S.sum() + C.square().sum() + V.sum(), R_new, loss


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compile_fullgraph(dynamic, autocast):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    weight = random((4, 2, 3, 3), torch.float32, 2).to(DEVICE)
    R = case(1, 2, (3, 3), 3).R(torch.float32, flat=True).to(DEVICE)
    for shape in [(5, 2, 13, 11), (6, 2, 7, 10)]:
        x = random(shape, torch.float32).to(DEVICE)
        results = []
        for function in (everything, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, weight, R)]
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                total, R_new, loss = function(*leaves)
            total.backward()
            results.append((total.detach(), R_new, loss, *(t.grad for t in leaves)))
        for i, (got, want) in enumerate(zip(results[1], results[0])):
            statistics = i in (1, 2)  # R_new and the loss: in float32 also under autocast
            assert error(got, want) < (2**-6 if autocast and not statistics else 1e-5)


@pytest.mark.parametrize("c", [CASES["2d"], CASES["1x1"], CASES["rows"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPAQUE)
def test_autocast_changes_nothing(name, dtype, c):
    arguments = arguments_of(name, c, dtype)
    want = several(getattr(torch.ops.dbp, name)(*arguments))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = several(getattr(torch.ops.dbp, name)(*arguments))
    assert all(g.dtype == torch.float32 and torch.equal(g, w) for g, w in zip(got, want))


@every_case
@pytest.mark.parametrize("name", OPAQUE)
def test_fake_tensors_have_the_form_of_real_ones(name, c):
    for dtype, layout in itertools.product(DTYPES, ("contiguous", "channels_last")):
        arguments = arguments_of(name, c, dtype, layout)
        want = several(getattr(torch.ops.dbp, name)(*arguments))
        with FakeTensorMode() as mode:
            fakes = (mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
            got = several(getattr(torch.ops.dbp, name)(*fakes))
        for g, w in zip(got, want):
            assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())
            assert g.device.type == w.device.type


# --------------------------------------------------------------------------- the optimiser


class Net(nn.Module):
    """Layers of equal shape, large and small ones, convolutions and a linear head."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            dnn.DecorConv2d(3, 8, 3, padding=1),
            *(dnn.DecorConv2d(8, 8, 3, padding=1) for _ in range(2)),
            dnn.DecorConv2d(8, 8, 1),
        )
        self.head = dnn.DecorLinear(8, 4)

    def forward(self, x):
        return self.head(self.convolutions(x).mean((2, 3)))


@pytest.mark.parametrize("sample", [1, 1.0], ids=["one image", "all"])
@pytest.mark.parametrize("demean", [False, True])
def test_a_step_equals_the_eager_backend_s(sample, demean, monkeypatch):
    batches = []
    for name in ("gram_update", "direct_update"):
        call = getattr(ops, name)
        spy = lambda *a, call=call, **k: batches.append(len(a[1])) or call(*a, **k)  # noqa: E731
        monkeypatch.setattr(ops, name, spy)
    results = []
    for backend in ("eager", "triton"):
        torch.manual_seed(0)
        net = Net().to(DEVICE)
        decor = dbp.DecorUpdate(net, lr=1e-2, sample=sample, demean=demean)
        with dbp.backend(backend):
            for step in range(2):
                net(random((6, 3, 7, 6), torch.float32, seed=step).to(DEVICE))
                decor.step()
        Rs = [m.R for m in net.modules() if hasattr(m, "R")]
        results.append((Rs, list(decor.losses().values())))
        if backend == "eager":
            assert not batches
    for got, want in zip(*(itertools.chain(*r) for r in results)):
        assert error(got, want) < 1e-5
    assert (results[1][0][0] - torch.eye(27, device=DEVICE)).abs().max() > 1e-3
    if isinstance(sample, float):  # with one image plan "samples", which has no kernel
        assert max(batches) == 2  # the two equal layers together


def test_equal_layers_go_through_one_chain(monkeypatch):
    """Plan "gram" on a batch of matrices: as many launches as for one."""
    counts = []
    start = runtime.Launch.__call__
    spy = lambda *a, **k: counts.append(1) or start(*a, **k)  # noqa: E731
    monkeypatch.setattr(runtime.Launch, "__call__", spy)
    S = torch.randn(5, 20, 20, device=DEVICE)
    S, R = S @ S.mT, torch.eye(20, device=DEVICE).repeat(5, 1, 1)
    due = ops.gram_update(S, R, rules.UpdateRule.make("standard", 0.5, 20))
    assert len(counts) == 1
    expected = rules.update_from_gram(S.double(), R.double(), 0.1, 0.5)
    assert error(due.new(R, 0.1), expected[0]) < 1e-5
    assert error(due.loss, expected[1]) < 1e-5


# --------------------------------------------------------------------------- where it runs


def unusable_without_interpreter() -> tuple[str | None, str]:
    try:
        with dbp.backend("triton"):
            dbp.patch_gram(torch.randn(2, 2, 5, 5), 3)
    except RuntimeError as failure:
        return backends.unusable("triton", "cpu"), str(failure)
    return None, ""


def test_compiled_kernels_refuse_cpu_tensors(compiled):
    reason, message = compiled(unusable_without_interpreter)
    assert "not on cpu" in reason
    assert reason in message


@pytest.mark.skipif(not runtime.INTERPRET, reason="there is a GPU here")
def test_the_interpreter_is_only_taken_on_request():
    assert backends.selected("cpu") == "triton"
    with dbp.backend("auto"):
        assert backends.selected("cpu") == "eager"


def test_missing_or_old_triton_is_one_sentence(monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    runtime._no_triton.cache_clear()
    try:
        assert "not installed" in runtime.unusable("cuda")
        monkeypatch.undo()
        monkeypatch.setattr(runtime.importlib.metadata, "version", lambda name: "3.5.1")
        runtime._no_triton.cache_clear()
        assert runtime.unusable("cuda") == "triton 3.5.1 is installed and 3.6 or newer is needed"
    finally:
        runtime._no_triton.cache_clear()
