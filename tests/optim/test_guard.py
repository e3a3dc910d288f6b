"""The guard: however R is driven it stays finite and invertible, and where it need not act, no bit changes."""

import copy
import itertools
import math
import warnings
import weakref

import pytest
import torch
from helpers import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import reference, rules
from dbp_kernels.optim import guard as guard_module
from dbp_kernels.optim import write_back
from dbp_kernels.optim.guard import MAX_ROW

F64 = torch.float64
CLIP = 0.5


def clipped_step(Z, R, lr, kappa, rule, clip=CLIP):
    """(R_new, ||lr M'|| / clip, I - lr M' after clipping) of one group from the definitions, in float64."""
    Z, R = Z.to(F64), R.to(F64)
    D = len(R)
    X = Z @ R.mT
    M = X.mT @ X / len(X)
    second = M.diagonal()
    C = M - torch.diag(second)
    c_weight, v_weight = (
        (1 - kappa, kappa) if rule == "standard" else ((1 - kappa) / max(1, D - 1), 2 * kappa)
    )
    if D == 1:
        c_weight = 0.0
    own = c_weight * C + torch.diag(v_weight * (second - 1))
    excess = lr * torch.linalg.matrix_norm(own) / clip
    step = own - torch.diag(own.diagonal() * (second == 0))
    factor = lr / max(1.0, excess.item())
    return R - factor * step @ R, excess.item(), torch.eye(D, dtype=F64) - factor * step


def decor(net, **options):
    return dbp.DecorUpdate(net, sample=1.0, **{"clip": CLIP, **options})


@pytest.fixture(autouse=True)
def quiet():
    """What is told is a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


# --------------------------------------------------------------------------- driven too hard

RULES = list(itertools.product(rules.RULES, (0.0, 0.5, 1.0)))
SAMPLES = {"few": 6, "many": 64}  # of D = 12: plan "samples", and another one


@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("lr", [1e-3, 1.0])  # 100 times the default, and far beyond
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_driven_too_hard(scale, lr, samples, steps, capsys):
    """Inputs of any scale, of which some are always 0: R and outputs stay finite, and no row passes the cap.

    Two features are always 0, two are the same, one is hardly ever anything else than 0.
    """
    torch.manual_seed(0)
    net = nn.ModuleList(dnn.DecorLinear(12, 3) for _ in RULES)
    groups = [
        {"modules": [(f"{rule} {kappa}", layer)], "rule": rule, "kappa": kappa, "lr": lr}
        for layer, (rule, kappa) in zip(net, RULES)
    ]
    update = decor(groups)
    data = scale * torch.randn(101, SAMPLES[samples], 12)
    data[..., :2] = 0
    data[..., 3] = data[..., 2]
    data[:-1, :, 4] = 0
    for step in range(steps):
        x = data[step % 101]
        for layer in net:
            outputs = layer(x)
        update.step()
    lines = []
    for layer, name in zip(net, update.losses()):
        R = layer.R
        assert R.isfinite().all()
        assert layer(data[-1]).isfinite().all()
        assert torch.linalg.vector_norm(R, dim=1).max() <= MAX_ROW
        assert torch.equal(R[:2], torch.eye(12)[:2])
        condition = torch.linalg.cond(R.double()).item()
        clipped = int(update.clipped()[name])
        lines.append(
            f"scale {scale:4g}  lr {lr:<5g}  {samples:4}  {name:15}  max |R| {R.abs().max():9.3g}  "
            f"condition {condition:9.3g}  clipped {clipped:5d}"
        )
    assert outputs.isfinite().all()
    assert all(int(count) == 0 for count in update.skipped().values())
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_without_a_clip_the_same_is_lost():
    """What the guard is for: the plain rule at the same step size."""
    layer = dnn.DecorLinear(12, 3)
    update = decor(layer, lr=1.0, clip=None)
    for _ in range(30):
        layer(30 * torch.randn(64, 12))
        update.step()
    assert int(update.skipped()["DecorLinear"]) or layer.R.abs().max() > 1e9
    assert int(update.clipped()["DecorLinear"]) == 0


# --------------------------------------------------------------------------- one step


PLANS = {"samples": 5, "direct": 30, "gram": 3000}


@pytest.mark.parametrize("on_host", [True, False], ids=["CPU", "GPU"])
@pytest.mark.parametrize("images", PLANS.values(), ids=PLANS)
@given(
    dim=st.sampled_from([1, 2, 7, 20]),
    kappa=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    rule=st.sampled_from(rules.RULES),
    lr=st.sampled_from([1e-4, 0.1, 1.0, 100.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    idle=st.booleans(),
    clip=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_a_step_by_its_definition(images, on_host, dim, kappa, rule, lr, scale, idle, clip, seed):
    """R_new is that of the oracle; I - lr M' after clipping has eigenvalues from 1 - clip to 1 + clip."""
    Z = scale * random((images, dim), seed=seed)
    if idle:
        Z[:, 0] = 0
    layer = dnn.DecorLinear(dim, 2, dtype=F64)
    layer.R.copy_(torch.eye(dim) + 0.2 * random((dim, dim), seed=seed + 1))
    if idle:
        layer.R[0] = torch.eye(dim)[0]
    expected, excess, step = clipped_step(Z, layer.R, lr, kappa, rule, clip)
    eigenvalues = torch.linalg.eigvalsh(step)
    assert eigenvalues.min() >= 1 - clip - 1e-12
    assert eigenvalues.max() <= 1 + clip + 1e-12
    update = decor(layer, lr=lr, kappa=kappa, rule=rule, clip=clip)
    layer(Z)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_back, "_on_host", lambda x: on_host)
        update.step()
    torch.testing.assert_close(layer.R, expected, rtol=1e-10, atol=1e-12)
    loss = reference.decor_update(Z, torch.eye(dim, dtype=F64), [], [], [], [], 1, lr, kappa, rule)[
        1
    ]
    assert update.losses()["DecorLinear"].isfinite()
    assert loss.isfinite()
    assert int(update.clipped()["DecorLinear"]) == (excess > 1)


@pytest.mark.parametrize("on_host", [True, False], ids=["CPU", "GPU"])
@pytest.mark.parametrize("images", PLANS.values(), ids=PLANS)
def test_each_group_has_a_factor_of_its_own(images, on_host, monkeypatch):
    monkeypatch.setattr(write_back, "_on_host", lambda x: on_host)
    layer = dnn.DecorConv1d(12, 4, 1, groups=2, dtype=F64)
    x = random((images, 12, 1))
    x[:, 6:] *= 30
    update = decor(layer, lr=0.01)
    layer(x)
    update.step()
    groups = x[:, :, 0].view(-1, 2, 6).transpose(0, 1)
    for z, R, large in zip(groups, layer.R, (False, True)):
        expected, excess, _ = clipped_step(z, torch.eye(6), 0.01, 0.5, "standard")
        assert (excess > 1) == large
        torch.testing.assert_close(R, expected, rtol=1e-10, atol=1e-12)
    assert int(update.clipped()["DecorConv1d"]) == 1


def network(dtype=torch.float32, size=6):
    torch.manual_seed(0)
    layers = [
        dnn.DecorConv2d(4, 4, 3, groups=2),
        nn.Tanh(),
        dnn.DecorConv2d(4, size, 4),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, dnn.DecorLinear(size, size), dnn.DecorLinear(size, 5)).to(dtype)


@pytest.mark.parametrize("on_host", [True, False], ids=["CPU", "GPU"])
@pytest.mark.parametrize("images", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("other", [False, True], ids=["", "beside a clipped one"])
def test_where_it_does_not_act_no_bit_changes(other, images, dtype, on_host, held, monkeypatch):
    """Also where rows are looked at, and where other layers of a batch are clipped."""
    monkeypatch.setattr(write_back, "_on_host", lambda x: on_host)
    if held:
        monkeypatch.setattr(guard_module.Gauge, "_reach", lambda *a: 2 * MAX_ROW)
    nets = [network(dtype) for _ in range(2)]
    # equal layers are updated together
    beside = [dnn.DecorLinear(6, 6).to(dtype) if other else None for _ in nets]
    updates = [
        decor([("net", net), *([("beside", layer)] if other else [])], lr=1e-3, clip=clip)
        for net, layer, clip in zip(nets, beside, (None, CLIP))
    ]
    for _ in range(5):
        x = torch.randn(images, 4, 6, 6, dtype=dtype)
        y = 1e3 * torch.randn(images, 6, dtype=dtype)
        for net, layer, update in zip(nets, beside, updates):
            net(x)
            if other:
                layer(y)
            update.step()
        plain, guarded = (net.state_dict() for net in nets)
        for name, value in guarded.items():
            assert torch.equal(value, plain[name]), name
    counts = [list(map(int, update.clipped().values())) for update in updates]
    assert counts == [4 * [0] + other * [0], 4 * [0] + other * [5]]


# --------------------------------------------------------------------------- rows


@pytest.mark.parametrize("on_host", [True, False], ids=["CPU", "GPU"])
@pytest.mark.parametrize("images", [3, 40], ids=["samples", "direct"])
@pytest.mark.parametrize("layers", [1, 2])
def test_no_row_passes_the_cap(layers, images, on_host, monkeypatch):
    """Of two features one is 1e-6 times the other: its row would grow to 1e6."""
    monkeypatch.setattr(write_back, "_on_host", lambda x: on_host)
    torch.manual_seed(0)
    net = nn.ModuleList(dnn.DecorLinear(4, 2, dtype=F64) for _ in range(layers))
    update = decor(net, lr=0.1, kappa=0.9)
    longest = []
    for _ in range(300):
        x = torch.randn(images, 4, dtype=F64)
        x[:, 3] *= 1e-6
        for layer in net:
            layer(x)
        update.step()
        longest.append(max(torch.linalg.vector_norm(m.R, dim=1).max().item() for m in net))
    assert max(longest) <= MAX_ROW
    assert longest[-1] > 0.99 * MAX_ROW
    assert all(int(count) > 50 for count in update.clipped().values())
    assert all(m.R.isfinite().all() for m in net)


def test_rows_are_looked_at_hardly_ever(monkeypatch):
    looks = []
    look = guard_module.Gauge._look
    monkeypatch.setattr(guard_module.Gauge, "_look", lambda g: looks.append(len(looks)) or look(g))
    held = guard_module.hold_rows_
    monkeypatch.setattr(write_back, "hold_rows_", lambda *a: looks.append("held") or held(*a))
    net = network()
    update = decor(net, lr=1e-3)
    for _ in range(50):
        net(torch.randn(8, 4, 6, 6))
        update.step()
    assert looks == [0]  # before the first step


def test_the_account_is_never_below_what_rows_are(monkeypatch):
    """What the host makes of it, however old it is."""
    net = network()
    update = decor(net, lr=0.3)
    gauge = update._guard.gauge(torch.device("cpu"))
    monkeypatch.setattr(gauge, "_read", lambda: None)
    known = [1.0, 6.0, 1.0, 0.0, 0.0]
    for step in range(12):
        net(torch.randn(8, 4, 6, 6))
        gauge._known = gauge._known or known
        reach = gauge._reach(CLIP)
        update.step()
        longest = max(torch.linalg.vector_norm(m.R, dim=-1).max() for m in layers_of(update))
        assert longest <= reach, step
        row, whole, growth = gauge.values[:3].tolist()
        assert longest <= (row + whole * (growth - 1)) * (1 + 1e-5), step


def test_the_account_of_a_group_that_may_change_R_by_more(monkeypatch):
    """A step that the host has not read of yet may have been one of another group, with a larger clip."""
    net = nn.ModuleList(dnn.DecorLinear(4, 2, dtype=F64) for _ in range(2))
    groups = [{"modules": [("0", net[0])], "clip": 0.9}, {"modules": [("1", net[1])], "clip": 0.1}]
    update = decor(groups, lr=1.0, kappa=1.0)
    gauge = update._guard.gauge(torch.device("cpu"))
    monkeypatch.setattr(gauge, "_read", lambda: None)
    reach = []
    look = gauge._reach
    monkeypatch.setattr(gauge, "_reach", lambda clip: reach.append(look(clip)) or reach[-1])
    for due in ((0, 1), (0,), (0,), (0,), (1,)):
        for place, (layer, group) in enumerate(zip(net, update.param_groups)):
            group["lr"] = float(place in due)
            layer(1e-3 * torch.randn(8, 4, dtype=F64))  # rows grow by clip / 2
        update.step()
        gauge._known = gauge._known or [1.45, 2.9, 1.0, 0.0, 0.0]
        longest = max(torch.linalg.vector_norm(m.R, dim=1).max() for m in net)
        assert longest <= reach[-1]
    assert reach[-1] < math.inf


@pytest.mark.parametrize("on_host", [True, False], ids=["CPU", "GPU"])
def test_a_step_whose_size_overflows_changes_nothing(on_host, monkeypatch):
    """||M'||^2 may where M' R does not."""
    monkeypatch.setattr(write_back, "_on_host", lambda x: on_host)
    layer = dnn.DecorLinear(1, 1)
    update = decor(layer, lr=0.1, kappa=1.0, rule="normalized")
    layer(torch.full((4, 1), 3.5e9))  # v^2 = 1.5e38, (2 v)^2 = 6e38
    update.step()
    assert layer.R.item() == 1
    assert int(update.skipped()["DecorLinear"]) == 0
    assert int(update.clipped()["DecorLinear"]) == 1


def test_the_account_is_exact_whatever_the_default_dtype():
    """In bfloat16 it would miss growth by less than 0.4 % a step."""
    layers = [dnn.DecorLinear(4, 2) for _ in range(2)]
    x = torch.randn(8, 4)
    accounts = []
    for layer, dtype in zip(layers, (torch.float32, torch.bfloat16)):
        torch.set_default_dtype(dtype)
        try:
            update = decor(layer, lr=1e-3)
            for _ in range(3):
                layer(x)
                update.step()
        finally:
            torch.set_default_dtype(torch.float32)
        accounts.append(update._guard.gauge(torch.device("cpu")).values)
    assert torch.equal(*accounts)
    assert accounts[0][2] > 1


def test_no_R_is_kept_that_the_model_has_left_behind():
    layer = dnn.DecorLinear(4, 2)
    update = decor(layer, lr=1e-3)
    layer(torch.randn(8, 4))
    update.step()
    left = weakref.ref(layer.R)
    layer.double()
    update.losses()
    assert left() is None


def layers_of(update):
    return [layer for _, layer in update._named_layers()]


def test_an_R_written_by_hand_is_looked_at():
    layer = dnn.DecorLinear(4, 2)
    update = decor(layer, lr=1e-4)
    for _ in range(3):
        layer(torch.randn(8, 4))
        update.step()
    layer.R[1] *= 1e3 * MAX_ROW
    layer(1e-6 * torch.randn(8, 4))
    update.step()
    assert torch.linalg.vector_norm(layer.R, dim=1).max() <= MAX_ROW
    assert int(update.clipped()["DecorLinear"]) == 1


def test_a_skipped_update_holds_no_row():
    layer = dnn.DecorLinear(4, 2)
    update = decor(layer, lr=1e-4)
    layer.R[1] *= 1e3 * MAX_ROW
    before = layer.R.clone()
    layer(torch.full((8, 4), float("nan")))
    update.step()
    assert torch.equal(layer.R, before)
    assert int(update.clipped()["DecorLinear"]) == 0


# --------------------------------------------------------------------------- what it tells


def test_the_first_time_warns_with_the_name():
    net = nn.Sequential(dnn.DecorLinear(4, 4), dnn.DecorLinear(4, 4), dnn.DecorLinear(4, 2))
    update = decor(
        [{"modules": [("first", net[0]), ("second", net[1])]}, {"modules": [("c", net[2])]}]
    )
    for group in update.param_groups:
        group["lr"] = 0.1

    def step(*scales):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for layer, scale in zip(net, scales):
                layer(scale * torch.ones(4, 4))
            update.step()
        return [str(warning.message) for warning in told]

    assert step(1e-3, 1e-3, 1e-3) == []
    (message,) = step(1e-3, 100.0, 1e-3)
    assert "layer 'second' was clipped" in message
    assert "lower lr" in message
    assert "normalise" in message
    assert step(1e-3, 100.0, 1e-3) == []
    clipped, skipped = step(100.0, 100.0, float("nan"))
    assert "layer 'first' was clipped" in clipped
    assert "layer 'c' was skipped" in skipped
    assert step(100.0, 100.0, float("nan")) == []
    assert [int(v) for v in update.clipped().values()] == [2, 4, 0]
    assert [int(v) for v in update.skipped().values()] == [0, 0, 2]


def test_a_warning_made_an_error_comes_after_the_step():
    """Also for the budget, whose count of steps is that of the optimiser."""
    layer = dnn.DecorLinear(4, 2)
    update = decor(layer, lr=1.0, budget=0.5, costs="planned")
    layer(100 * torch.randn(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(RuntimeWarning, match="was clipped"):
            update.step()
    state = update.state_dict()
    assert (state["steps"], update._budget.schedule.step) == (1, 1)


def test_several_layers_are_one_warning():
    net = nn.ModuleList(dnn.DecorLinear(4, 4) for _ in range(5))
    update = decor(net, lr=1.0)
    for layer in net:
        layer(100 * torch.randn(4, 4))
    with pytest.warns(RuntimeWarning) as told:
        update.step()
    assert len(told) == 1
    assert "layers '0', '1', '2' and 2 more layers" in str(told[0].message)


def test_nothing_waits_for_what_is_on_its_way(monkeypatch):
    """As on a GPU, whose numbers come some steps later: steps go on, and rows are held meanwhile."""
    arrived = []

    class Late(guard_module.Later):
        def get(self):
            return super().get() if arrived else None

    monkeypatch.setattr(guard_module, "Later", Late)
    layer = dnn.DecorLinear(4, 2)
    update = decor(layer, lr=1.0)
    gauge = update._guard.gauge(torch.device("cpu"))

    def step():
        layer(100 * torch.randn(8, 4))
        update.step()
        return gauge.held

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [step() for _ in range(4)] == 4 * [True]
    arrived.append(True)
    with pytest.warns(RuntimeWarning, match="'DecorLinear' was clipped"):
        assert [step() for _ in range(3)] == [False, False, False]


# --------------------------------------------------------------------------- options and checkpoints


@pytest.mark.parametrize("clip", [0, 1, -0.1, 1.5, float("nan"), "a", True])
def test_bad_clip(clip):
    with pytest.raises(
        ValueError, match=f"clip={clip!r}: expected None, or a number above 0 and below 1"
    ):
        dbp.DecorUpdate(dnn.DecorLinear(3, 2), clip=clip)


def test_groups_have_clips_of_their_own():
    net = nn.ModuleList(dnn.DecorLinear(5, 2, dtype=F64) for _ in range(3))
    clips = (None, 0.1, 0.5)
    update = decor(
        [{"modules": [(str(c), layer)], "clip": c} for layer, c in zip(net, clips)], lr=0.5
    )
    Z = 2 * random((40, 5))
    for layer in net:
        layer(Z)
    update.step()
    for layer, clip in zip(net, clips):
        expected = clipped_step(Z, torch.eye(5), 0.5, 0.5, "standard", clip or 1e9)[0]
        torch.testing.assert_close(layer.R, expected, rtol=1e-12, atol=1e-12)
    assert [int(v) for v in update.clipped().values()] == [0, 1, 1]


@pytest.mark.parametrize("clip", [0, 1.5, -0.1, "a"])
def test_a_bad_clip_set_by_hand_is_found_by_step(clip):
    layer = dnn.DecorLinear(3, 2)
    update = decor(layer, lr=0.1)
    update.param_groups[0]["clip"] = clip
    layer(100 * torch.randn(4, 3))
    with pytest.raises(ValueError, match=f"clip={clip!r}: expected"):
        update.step()
    assert torch.equal(layer.R, torch.eye(3))
    assert update.losses() == {}


def run(net, update, steps, seed):
    data = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        net(20 * torch.randn(8, 4, 6, 6, generator=data))
        update.step()


def test_checkpoints_continue_bit_for_bit():
    net = network()
    update = decor(net, lr=0.1)
    run(net, update, 3, 0)
    saved = copy.deepcopy((net.state_dict(), update.state_dict()))
    other = network()
    continued = decor(other, lr=0.1)
    other.load_state_dict(saved[0])
    continued.load_state_dict(saved[1])
    assert continued.clipped() == update.clipped()
    for pair in ((net, update), (other, continued)):
        run(*pair, 3, 1)
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))
    assert continued.clipped() == update.clipped()
    assert int(update.clipped()["0"]) == 6


def test_checkpoints_from_before_there_was_a_clip():
    net = network()
    update = decor(net, lr=0.1)
    run(net, update, 2, 0)
    old = update.state_dict()
    for group in old["param_groups"]:
        del group["clip"]
    for state in old["state"].values():
        del state["clipped"]
    other = decor(network(), lr=0.1)
    other.load_state_dict(old)
    assert set(map(int, other.clipped().values())) == {0}
    assert [group["clip"] for group in other.param_groups] == [CLIP]
    run(other._layers and net, update, 1, 1)


def test_copies_and_pickles_from_before_there_was_a_clip():
    layer = dnn.DecorLinear(4, 2)
    update = decor(layer, lr=0.1)
    layer(torch.randn(8, 4))
    update.step()
    del update.state[layer.R]["clipped"], update.defaults["clip"], update.param_groups[0]["clip"]
    layer, update = copy.deepcopy((layer, update))
    layer(torch.randn(8, 4))
    update.step()
    assert update.clipped() == {"DecorLinear": 0}


# --------------------------------------------------------------------------- attach


def attached(net, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    return optimizer, dbp.attach(net, optimizer, sample=1.0, stagger=False, **options)


def test_attach_is_the_layer_form():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    layers = dbp.decorrelate_model(copy.deepcopy(plain))
    update = decor(layers, lr=0.1)
    weights = torch.optim.SGD(layers.parameters(), lr=1e-3)
    optimizer, handle = attached(plain, lr=0.1, clip=CLIP)
    for _ in range(20):
        x = 5 * torch.randn(16, 6, dtype=F64)
        for model in (plain, layers):
            model(x).square().mean().backward()
        optimizer.step()
        weights.step()
        update.step()
        optimizer.zero_grad()
        weights.zero_grad()
    for name in ("0", "2"):
        torch.testing.assert_close(handle.R(name), layers.get_submodule(name).R, rtol=0, atol=1e-12)
    counts = {name: int(count) for name, count in handle.clipped().items()}
    assert counts == {name: int(count) for name, count in update.clipped().items()}
    assert counts["0"] > 0


def test_attach_keeps_counts_in_the_optimisers_state():
    def trained():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
        return net, *attached(net, lr=0.1)

    net, optimizer, handle = trained()
    for _ in range(3):
        net(30 * torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    _, loaded, its = trained()
    state = copy.deepcopy(optimizer.state_dict())
    loaded.load_state_dict(copy.deepcopy(state))
    assert its.clipped() == handle.clipped()
    assert int(its.clipped()["0"]) == 3
    for group in state["param_groups"]:
        for entry in group["dbp"]["layers"].values():
            del entry["clipped"]
    loaded.load_state_dict(state)
    assert int(its.clipped()["0"]) == 0
    assert int(its.skipped()["0"]) == int(handle.skipped()["0"])
