"""The optimiser form against the layer form, in float64: the same algorithm."""

import copy
import gc
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dbp_kernels as dbp
from dbp_kernels.optim import stagger

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adam, one by one": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}
# lr of R above the default: what is compared must have moved
OPTIONS = {"lr": 1e-2, "sample": 0.5}


class Net(nn.Module):
    """A network with every kind of layer that the layer form has, ending in (N, T, D) -> classes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.tokens = nn.Linear(6, 12)
        self.line = nn.Conv1d(12, 7, 3)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.grouped(x)) + self.depthwise(x)
        x = F.relu(self.norm(self.up(x)))
        x = torch.tanh(self.tokens(x.flatten(2).transpose(1, 2)))
        x = F.relu(self.line(x.transpose(1, 2))).mean(2)
        return self.head(x)


def batches(steps, micro=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps * micro):
        x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield 1 + x + x.roll(1, 3), torch.randint(5, (6,), generator=generator)


def make():
    torch.manual_seed(0)
    return Net().double()


class LayerForm:
    """The same training with decorrelated layers."""

    def __init__(self, make_optimizer, **options):
        self.model = dbp.decorrelate_model(make())
        self.optimizer = make_optimizer(self.model.parameters())
        torch.manual_seed(1)  # from which the order of random samples comes
        self.decor = dbp.DecorUpdate(self.model, **options)

    def step(self):
        self.optimizer.step()
        self.decor.step()
        self.optimizer.zero_grad()

    def of(self, name):
        layer = self.model.get_submodule(name)
        return layer._condense(), layer.weight, layer.R


class OptimizerForm:
    def __init__(self, make_optimizer, **options):
        self.model = make()
        self.optimizer = make_optimizer(self.model.parameters())
        torch.manual_seed(1)
        self.decor = dbp.attach(self.model, self.optimizer, **options)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def of(self, name):
        return self.model.get_submodule(name).weight, self.decor.W(name), self.decor.R(name)


def train(form, steps, micro=1, seed=0):
    losses = []
    for n, (x, y) in enumerate(batches(steps, micro, seed), 1):
        loss = F.cross_entropy(form.model(x), y)
        loss.backward()
        losses.append(loss.detach())
        if n % micro == 0:
            form.step()
    return torch.stack(losses)


LAYERS = ("first", "grouped", "depthwise", "up", "tokens", "line", "head")


def assert_equal(layers, attached, tolerance=1e-12):
    for name in LAYERS:
        for ours, theirs in zip(attached.of(name), layers.of(name)):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)
    for ours, theirs in zip(
        attached.optimizer.state_dict()["state"].values(),
        layers.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=tolerance, atol=tolerance)


def compare(make_optimizer, steps=20, micro=1, **options):
    forms = LayerForm(make_optimizer, **options), OptimizerForm(make_optimizer, **options)
    losses = [train(form, steps, micro) for form in forms]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    assert_equal(*forms)
    moved = forms[1].decor.R("first") - torch.eye(27, dtype=torch.float64)
    assert moved.abs().max() > 1e-3
    return forms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_layer_form(name):
    compare(OPTIMIZERS[name], **OPTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-3, "rule": "normalized", "kappa": 0.1, "sample": 4},
        {"lr": 1e-2, "demean": True, "kappa": 1.0, "sample": 1.0},
        {"lr": 1e-2, "update_every": 3, "kappa": 0.0, "stagger": False},
        {"lr": 1e-2, "update_every": 3, "stagger": True},
        {"lr": 1e-2, "sampling": "random", "sample": 0.5},
        {"lr": 1e-2, "budget": 0.2, "costs": "planned", "sample": 0.5},
    ],
    ids=lambda o: ", ".join(o),
)
def test_equals_the_layer_form_with_options(options):
    compare(OPTIMIZERS["adam"], **options)


def test_accumulation_over_micro_steps_equals_the_layer_form():
    compare(OPTIMIZERS["adamw"], micro=3, **OPTIONS)


def test_layers_take_turns():
    """After the first step each is due once in every 3 steps, and about as many at each."""
    form = OptimizerForm(OPTIMIZERS["sgd"], update_every=3, **OPTIONS)
    moved = []
    for step in range(7):
        before = {name: form.decor.R(name).clone() for name in LAYERS}
        train(form, 1, seed=step)
        moved.append({n for n in LAYERS if not torch.equal(form.decor.R(n), before[n])})
    assert moved[0] == set(LAYERS)
    assert moved[1] | moved[2] | moved[3] == set(LAYERS)
    assert moved[1:4] == moved[4:7]
    assert all(2 <= len(turn) <= 3 for turn in moved[1:])


def test_turns_are_shared_out_by_cost():
    assert stagger.phases([5, 1, 1, 3], [2, 2, 2, 2]) == [0, 1, 1, 1]
    assert stagger.phases([1, 1, 9, 1], [1, 2, 1, 2]) == [0, 0, 0, 1]


# What the optimiser and the model see.


def trained(steps=3, optimizer="adamw", **options):
    form = OptimizerForm(OPTIMIZERS[optimizer], **{**OPTIONS, **options})
    train(form, steps)
    return form


def A_of(form, name):
    site = form.decor._site(name)
    return site.condensed()


def test_the_model_is_a_plain_one():
    form = trained()
    plain = make()
    assert form.model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(form.model.state_dict())
    x, _ = next(batches(1, seed=5))
    torch.testing.assert_close(plain.eval()(x), form.model.eval()(x), rtol=0, atol=0)
    assert all(type(a) is type(b) for a, b in zip(plain.modules(), form.model.modules()))


def test_the_parameters_and_their_memory_stay_the_same():
    form = OptimizerForm(OPTIMIZERS["adamw"], **OPTIONS)
    before = {n: (id(p), p.data_ptr()) for n, p in form.model.named_parameters()}
    train(form, 3)
    assert before == {n: (id(p), p.data_ptr()) for n, p in form.model.named_parameters()}
    for name in LAYERS:
        assert torch.equal(form.model.get_submodule(name).weight, A_of(form, name))


def test_backward_through_a_pass_from_before_the_step_raises():
    form = OptimizerForm(OPTIMIZERS["adamw"], **OPTIONS)
    x, y = next(batches(1))
    loss = F.cross_entropy(form.model(x), y)
    loss.backward(retain_graph=True)
    form.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_those_of_A_before_and_after_the_step():
    form = trained()
    x, y = next(batches(1, seed=7))
    F.cross_entropy(form.model(x), y).backward()
    weight = form.model.tokens.weight
    gradient = weight.grad
    kept = gradient.clone()
    form.optimizer.step()
    assert weight.grad is gradient
    assert torch.equal(gradient, kept)


def closure_of(form, x, y):
    def evaluate():
        form.optimizer.zero_grad()
        if isinstance(form, LayerForm):  # where samples do not go with their gradient
            form.decor.discard()
        loss = F.cross_entropy(form.model(x), y)
        loss.backward()
        return loss

    return evaluate


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_closure_is_evaluated_on_A(name):
    plain, closure = (OptimizerForm(OPTIMIZERS[name], **OPTIONS) for _ in range(2))
    losses = train(plain, 5)
    seen = []
    for x, y in batches(5):
        seen.append(closure.optimizer.step(closure_of(closure, x, y)).detach())
    torch.testing.assert_close(torch.stack(seen), losses, rtol=0, atol=0)
    for layer in LAYERS:
        for ours, theirs in zip(closure.of(layer), plain.of(layer)):
            assert torch.equal(ours, theirs)


def test_lbfgs_evaluates_A_where_the_weights_are():
    """Against the layer form, which forms A in every pass."""
    make_optimizer = lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)  # noqa: E731
    layers, attached = (f(make_optimizer, **OPTIONS) for f in (LayerForm, OptimizerForm))
    for form in (layers, attached):
        for x, y in batches(3):
            form.optimizer.step(closure_of(form, x, y))
            if form is layers:
                form.decor.step()
    for name in LAYERS:
        for ours, theirs in zip(attached.of(name), layers.of(name)):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class Failing(torch.optim.SGD):
    fail = False

    def step(self, closure=None):
        result = super().step(closure)
        if self.fail:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("wrapped_before", [True, False])
def test_A_comes_back_when_a_step_raises(wrapped_before):
    """Also where somebody put a wrapper of step() aside before, and uses that."""
    model = make()
    optimizer = Failing(model.parameters(), lr=0.1)
    step = optimizer.step
    decor = dbp.attach(model, optimizer, **OPTIONS)
    x, y = next(batches(1))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = model.head.weight.detach().clone()
    R, steps = decor.R("head").clone(), decor._engine._steps
    W, gradient = decor.W("head").clone(), model.head.weight.grad.clone()
    optimizer.fail = True
    with pytest.raises(KeyboardInterrupt):
        (step if wrapped_before else optimizer.step)()
    if wrapped_before:
        model(x)
    assert torch.equal(decor.R("head"), R)
    assert decor._engine._steps == steps
    assert torch.equal(model.head.weight.grad, gradient)
    # the weights have made their step, as they would have without us, and A is theirs
    assert not torch.equal(decor.W("head"), W)
    assert not torch.equal(model.head.weight, before)
    assert torch.equal(model.head.weight, decor._site("head").condensed())
    optimizer.fail = False
    optimizer.step()
    assert torch.equal(model.head.weight, decor._site("head").condensed())


@pytest.mark.parametrize("wrapped_before", [True, False])
def test_a_closure_that_raises_leaves_everything_usable(wrapped_before):
    def broken():
        raise ZeroDivisionError

    forms = []
    for interrupted in (False, True):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = optimizer.step
        decor = dbp.attach(model, optimizer, **OPTIONS)
        for n, (x, y) in enumerate(batches(3)):
            if interrupted and n == 1:
                with pytest.raises(ZeroDivisionError):
                    (step if wrapped_before else optimizer.step)(broken)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        forms.append((model.state_dict(), decor.W("head"), decor.R("head")))
    torch.testing.assert_close(*forms, rtol=0, atol=0)


def test_A_is_that_of_W_when_learning_R_raises(monkeypatch):
    form = trained(2)
    x, y = next(batches(1))
    F.cross_entropy(form.model(x), y).backward()
    before = [form.decor.R(name).clone() for name in LAYERS]

    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr("dbp_kernels.optim.decor_update.local_updates", full)
    with pytest.raises(MemoryError):
        form.optimizer.step()
    assert all(map(torch.equal, before, map(form.decor.R, LAYERS)))
    for name in LAYERS:
        assert torch.equal(form.model.get_submodule(name).weight, A_of(form, name))


def test_super_step_of_a_subclass_counts_once():
    forms = [
        OptimizerForm(lambda p, c=c: c(p, lr=0.05), **OPTIONS) for c in (torch.optim.SGD, Failing)
    ]
    for form in forms:
        train(form, 4)
    for name in LAYERS:
        assert all(map(torch.equal, *(form.of(name) for form in forms)))


@pytest.mark.parametrize("first", ["scheduler", "attach"])
def test_with_a_learning_rate_scheduler(first):
    def run(order):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = lambda: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # noqa: E731
        if order == "scheduler":
            schedule = scheduler()
        decor = dbp.attach(model, optimizer, **OPTIONS)
        if order == "attach":
            schedule = scheduler()
        for x, y in batches(4):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return decor

    decor = run(first)
    layers = LayerForm(lambda p: torch.optim.SGD(p, lr=0.1), **OPTIONS)
    schedule = torch.optim.lr_scheduler.ExponentialLR(layers.optimizer, 0.5)
    for x, y in batches(4):
        F.cross_entropy(layers.model(x), y).backward()
        layers.step()
        schedule.step()
    for name in LAYERS:
        torch.testing.assert_close(decor.W(name), layers.of(name)[1], rtol=1e-12, atol=1e-12)


def test_several_optimizers():
    def make_form(several):
        model = make()
        head = list(model.head.parameters())
        rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
        optimizers = (
            [torch.optim.SGD(rest, lr=0.1), torch.optim.SGD(head, lr=0.1)]
            if several
            else [torch.optim.SGD(model.parameters(), lr=0.1)]
        )
        decor = dbp.attach(model, optimizers, **OPTIONS)
        for x, y in batches(4):
            F.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        return decor

    one, two = make_form(False), make_form(True)
    for name in LAYERS:
        assert torch.equal(one.W(name), two.W(name))
        assert torch.equal(one.R(name), two.R(name))


def test_detach_leaves_a_plain_optimizer():
    form = trained()
    weight = form.model.head.weight.detach().clone()
    form.decor.detach()
    assert torch.equal(form.model.head.weight, weight)
    x, y = next(batches(1))
    F.cross_entropy(form.model(x), y).backward()
    R = form.decor.R("head").clone()
    form.step()
    assert not torch.equal(form.model.head.weight, weight)
    assert torch.equal(form.decor.R("head"), R)
    dbp.attach(form.model, form.optimizer)


# Checkpoints.


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_checkpoint_resumes_bit_for_bit(optimizer, tmp_path):
    options = {"sampling": "random", "update_every": 2}
    whole = trained(6, optimizer, **options)
    first = trained(3, optimizer, **options)
    torch.save((first.model.state_dict(), first.optimizer.state_dict()), tmp_path / "saved")
    second = OptimizerForm(OPTIMIZERS[optimizer], **{**OPTIONS, **options})
    model, state = torch.load(tmp_path / "saved", weights_only=True)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(state)
    data = list(batches(6))
    for form, part in ((second, data[3:]),):
        for x, y in part:
            F.cross_entropy(form.model(x), y).backward()
            form.step()
    for name in LAYERS:
        assert all(map(torch.equal, whole.of(name), second.of(name)))
    assert whole.decor.losses().keys() == second.decor.losses().keys()
    for name, loss in whole.decor.losses().items():
        assert torch.equal(loss, second.decor.losses()[name])


def test_a_checkpoint_loaded_before_attach_is_taken_over():
    first = trained(3)
    model = make()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    model.load_state_dict(first.model.state_dict())
    optimizer.load_state_dict(first.optimizer.state_dict())
    decor = dbp.attach(model, optimizer, **OPTIONS)
    for name in LAYERS:
        assert torch.equal(decor.R(name), first.decor.R(name))
        assert torch.equal(decor.W(name), first.decor.W(name))


def test_a_plain_checkpoint_starts_at_the_identity_and_says_so():
    model = make()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    plain = optimizer.state_dict()
    form = trained(2)
    with pytest.warns(UserWarning, match="no R of 'first', 'grouped', 'depthwise' and 4 more"):
        form.optimizer.load_state_dict(plain)
    assert torch.equal(form.decor.R("first"), torch.eye(27, dtype=torch.float64))
    assert torch.equal(form.decor.W("first"), form.model.first.weight)


# What is attached, and what is not.


def test_what_is_left_alone_and_why():
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 300), nn.Linear(300, 9, bias=False)
    )
    model[3].weight = nn.Parameter(model[3].weight.detach())
    tied = nn.Linear(4, 9)
    tied.weight = model[0].weight
    model.append(tied)
    outside = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.append(outside)
    decor = dbp.attach(model, optimizer, exclude="1", max_size=200)
    assert list(decor.decorrelated()) == ["2"]
    assert decor.left_alone() == {
        "0": "Embedding is no kind that dbp.register knows",
        "1": "among exclude",
        "3": "its R would have 300 > max_size=200 rows, 0 MiB",
        "4": "its weight is that of '0' too",
        "5": "its weight is not in the optimiser",
    }
    assert "left alone:\n  0: Embedding" in repr(decor)


def test_groups_have_options_of_their_own():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, lr=1e-2, groups=[{"modules": "head", "lr": 0.0}])
    x, y = next(batches(1))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert torch.equal(decor.R("head"), torch.eye(7, dtype=torch.float64))
    assert not torch.equal(decor.R("line"), torch.eye(36, dtype=torch.float64))


def test_a_frozen_weight_keeps_its_R():
    form = trained()
    form.model.tokens.requires_grad_(False)
    before = form.decor.R("tokens").clone(), form.model.tokens.weight.detach().clone()
    train(form, 2, seed=3)
    assert torch.equal(form.decor.R("tokens"), before[0])
    torch.testing.assert_close(form.model.tokens.weight, before[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda m, o: (m, [o], {"lr": -1}), ValueError, "lr=-1"),
        (lambda m, o: (m, 3, {}), TypeError, "optimizer=3"),
        (lambda m, o: (m, [], {}), ValueError, "at least one"),
        (lambda m, o: (m.parameters(), o, {}), TypeError, "model must be"),
        (lambda m, o: (m, o, {"include": "nothing"}), ValueError, "include='nothing'"),
        (lambda m, o: (m, o, {"exclude": "*"}), ValueError, "found no layer"),
        (lambda m, o: (dbp.decorrelate_model(m), o, {}), ValueError, "decorrelated layer 'first'"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizers, options = arguments(model, optimizer)
    with pytest.raises(error, match=message):
        dbp.attach(model, optimizers, **options)
    assert not optimizer._optimizer_step_pre_hooks
    assert "step" not in optimizer.__dict__


def test_attaching_twice_is_an_error():
    form = trained(1)
    with pytest.raises(ValueError, match="'first' is attached already"):
        dbp.attach(form.model, form.optimizer)


# Copies of the model, and what compiles or calls it otherwise.


def pending(form):
    return sum(len(r.samples) for recorders in form.decor._engine._recorders for r in recorders)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_model_feeds_nobody(copied):
    form = trained()
    other = copied(form.model)
    x, _ = next(batches(1))
    torch.testing.assert_close(other(x), make_like(form.model)(x), rtol=0, atol=0)
    assert pending(form) == 0
    form.model(x)
    assert pending(form) == len(LAYERS)


def make_like(model):
    plain = make()
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_handle_need_not_be_kept():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dbp.attach(model, optimizer, **OPTIONS)
    gc.collect()
    for x, y in batches(2):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    (feed,) = model.head._forward_hooks.values()
    assert not torch.equal(feed.site.R, torch.eye(7, dtype=torch.float64))


def test_averaged_models():
    form = trained()
    averaged = torch.optim.swa_utils.AveragedModel(form.model)
    train(form, 1)
    averaged.update_parameters(form.model)
    averaged.eval()(next(batches(1))[0])
    assert pending(form) == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_under_torch_compile(when):
    torch.compiler.reset()
    eager, form = (OptimizerForm(OPTIMIZERS["sgd"], **OPTIONS) for _ in range(2))
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    if when == "before":
        form = OptimizerForm(OPTIMIZERS["sgd"], **OPTIONS)
        form.decor.detach()
        compiled = torch.compile(form.model, backend=counter, fullgraph=True)
        form.decor = dbp.attach(form.model, form.optimizer, **OPTIONS)
    else:
        compiled = torch.compile(form.model, backend=counter, fullgraph=True)
    plain = form.model
    form.model = compiled
    losses = train(form, 6)
    form.model = plain
    torch.testing.assert_close(losses, train(eager, 6), rtol=1e-9, atol=1e-9)
    for name in LAYERS:
        for ours, theirs in zip(form.of(name), eager.of(name)):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


def test_activation_checkpointing_samples_once():
    from torch.utils.checkpoint import checkpoint

    plain, form = (OptimizerForm(OPTIMIZERS["sgd"], **OPTIONS) for _ in range(2))
    inner = form.model.forward
    train(plain, 3)
    for x, y in batches(3):
        out = checkpoint(inner, x, use_reentrant=False)
        F.cross_entropy(out, y).backward()
        form.step()
    for name in LAYERS:
        assert all(map(torch.equal, plain.of(name), form.of(name)))


def test_autocast_and_half_precision_weights_keep_R_in_float32():
    model = make().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, **OPTIONS)
    for x, y in batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(x.float()), y).backward()
            optimizer.step()
    assert decor.R("head").dtype == torch.float32
    assert model.head.weight.dtype == torch.float32
    half = make().bfloat16()
    optimizer = torch.optim.SGD(half.parameters(), lr=0.1)
    decor = dbp.attach(half, optimizer, **OPTIONS)
    for x, y in batches(3):
        F.cross_entropy(half(x.bfloat16()).float(), y).backward()
        optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert decor.R("head").dtype == torch.float32
    assert half.head.weight.dtype == torch.bfloat16


def test_moving_the_model_takes_R_along():
    form = trained()
    form.model.float()
    form.model.double()
    with pytest.warns(UserWarning, match="were changed outside"):  # by rounding to float32
        train(form, 1)
    assert form.decor.R("head").dtype == torch.float64


# Writes from outside.


def test_an_equal_reload_changes_nothing():
    form, other = trained(4), trained(4)
    form.model.load_state_dict(copy.deepcopy(form.model.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(form, 1, seed=9)
    train(other, 1, seed=9)
    for name in LAYERS:
        assert all(map(torch.equal, form.of(name), other.of(name)))


def test_a_write_from_outside_stays_and_W_follows():
    form = trained(4, lr=3e-2)
    best = make()
    form.model.load_state_dict(best.state_dict())
    x, y = next(batches(1))
    F.cross_entropy(form.model(x), y).backward()
    for group in form.optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    with pytest.warns(UserWarning, match="'depthwise' and 4 more layers were changed"):
        form.optimizer.step()
    for name in LAYERS:
        R, W = form.decor.R(name), form.decor.W(name)
        assert not torch.equal(R, torch.eye(R.shape[-1], dtype=R.dtype))
        assert torch.equal(form.model.get_submodule(name).weight, A_of(form, name))
        assert not torch.allclose(W, best.get_submodule(name).weight, atol=1e-4)
    form.decor._engine.discard()
    frozen = trained(4, lr=3e-2)
    frozen.model.load_state_dict(best.state_dict())
    for group in frozen.decor._engine.param_groups:
        group["lr"] = 0.0
    for group in frozen.optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    F.cross_entropy(frozen.model(x), y).backward()
    with pytest.warns(UserWarning, match="were changed outside"):
        frozen.optimizer.step()
    for name in LAYERS:  # neither W nor R has moved: the function is the one that was loaded
        weight = frozen.model.get_submodule(name).weight
        torch.testing.assert_close(weight, best.get_submodule(name).weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw, fused"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_gradient_scaler_that_skips_changes_nothing(skip, optimizer):
    """A fused optimiser is called, and told on the device; the images are fine, the loss is not."""
    form = trained(2, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [t.detach().clone() for name in LAYERS for t in form.of(name)]
    x, y = next(batches(1))
    loss = F.cross_entropy(form.model(x), y) * (math.inf if skip else 1)
    scaler.scale(loss).backward()
    scaler.step(form.optimizer)
    scaler.update()
    after = [t for name in LAYERS for t in form.of(name)]
    assert all(map(torch.equal, before, after)) == skip
    assert not any(map(int, form.decor.skipped().values()))


# Further kinds.


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (5, 4, 7)),
        (nn.ConvTranspose3d(4, 2, 2, stride=2), (5, 4, 3, 3, 3)),
        (nn.Conv3d(4, 6, (1, 3, 2), groups=2, padding=1), (5, 4, 3, 4, 3)),
        (nn.Conv1d(4, 6, 3, padding_mode="circular", padding=1), (5, 4, 7)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_one_step_of_every_convolution_is_the_definition(layer, shape):
    """W and R as the paper has them: the function of W R, gradients of W, R's own rule."""
    torch.manual_seed(0)
    layer = layer.double()
    W0 = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    decor = dbp.attach(layer, optimizer, lr=1e-2, sample=1.0)
    name = type(layer).__name__
    x = 1 + torch.randn(shape, dtype=torch.float64)
    for _ in range(2):  # the second with an R that is not the identity
        W, R = decor.W(name).clone().requires_grad_(), decor.R(name).clone()
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            groups, D = layer.groups, R.shape[-1]
            A = (R.reshape(groups, D, D).mT @ W.reshape(groups, D, -1)).reshape(W.shape)
        else:
            D, groups = R.shape[-1], layer.groups
            A = (W.reshape(groups, -1, D) @ R.reshape(groups, D, D)).reshape(W.shape)
        expected = torch.func.functional_call(layer, {"weight": A, "bias": layer.bias}, (x,))
        out = layer(x)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        expected.square().sum().backward()
        layer.zero_grad()
        out = layer(x)
        out.square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(decor.W(name), W - 0.1 * W.grad, rtol=1e-10, atol=1e-10)
        site = decor._site(name)
        R_new, _ = dbp.decor_update(x, R, **site.patches.window, lr=1e-2)
        torch.testing.assert_close(decor.R(name), R_new, rtol=1e-12, atol=1e-12)
        optimizer.zero_grad()
    assert not torch.equal(W0, decor.W(name))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)

    def forward(self, x, memory=None):
        return self.attention(x, *[x if memory is None else memory] * 2)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_whose_query_is_key_and_value(batch_first):
    torch.manual_seed(0)
    model = Attention(batch_first).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decor = dbp.attach(model, optimizer, lr=1e-2, sample=0.5)
    assert list(decor.decorrelated()) == ["attention"]
    assert "without calling it" in decor.left_alone()["attention.out_proj"]
    x = 1 + torch.randn(4, 3, 6, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    sampled = x[:2] if batch_first else x.transpose(0, 1)[:2]
    expected, _ = dbp.decor_update(sampled, torch.eye(6, dtype=torch.float64), (), lr=1e-2)
    torch.testing.assert_close(decor.R("attention"), expected, rtol=1e-12, atol=1e-12)
    R = decor.R("attention").clone()
    model(x, x + 1).sum().backward()
    optimizer.step()
    assert torch.equal(decor.R("attention"), R)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))

    def forward(self, x):
        return x @ self.kernel


def test_registering_a_kind():
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="is no kind that"):
        dbp.attach(model, optimizer)
    dbp.register(Scaled, lambda m: dbp.Patches(6, weight="kernel", transposed=True))
    decor = dbp.attach(model, optimizer, lr=1e-2, sample=1.0)
    x = 1 + torch.randn(5, 6, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    A = decor.R("Scaled").T @ decor.W("Scaled")
    torch.testing.assert_close(model.kernel, A, rtol=1e-12, atol=1e-12)
    for bad in (3, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="kind="):
            dbp.register(bad, lambda m: dbp.Patches(1))
    with pytest.raises(TypeError, match="describe=3"):
        dbp.register(Scaled, 3)


# Samples whose gradient is dropped.


@pytest.mark.parametrize("set_to_none", [True, False])
def test_samples_of_a_skipped_step_go_with_its_gradient(set_to_none):
    """Whether zero_grad comes after the step or between forward and backward."""
    form, expected = trained(3), trained(3)
    first, second = batches(2, seed=8)
    for x, y in (first, second):
        loss = F.cross_entropy(form.model(x), y)
        form.optimizer.zero_grad(set_to_none)
        loss.backward()
        # the first step is skipped
    assert pending(form) == len(LAYERS)
    form.optimizer.step()
    F.cross_entropy(expected.model(second[0]), second[1]).backward()
    expected.optimizer.step()
    for name in LAYERS:
        assert torch.equal(form.decor.R(name), expected.decor.R(name))


def test_zero_grad_between_micro_steps_keeps_what_is_still_to_go_backward():
    form = trained(1)
    (x1, y1), (x2, y2), (x3, y3) = batches(3, seed=8)
    F.cross_entropy(form.model(x1), y1).backward()
    late = F.cross_entropy(form.model(x2), y2) + F.cross_entropy(form.model(x3), y3)
    assert pending(form) == 3 * len(LAYERS)
    form.optimizer.zero_grad()
    assert pending(form) == 2 * len(LAYERS)
    recorder = form.decor._engine._recorders[0][0]
    assert torch.equal(recorder.samples[0], x2[:3])
    late.backward()
    form.optimizer.step()
    assert pending(form) == 0


# Gradients of W.


@pytest.mark.parametrize("set_to_none", [True, False])
def test_transformed_gradients_are_those_of_W_and_are_stepped_with(set_to_none):
    """Against the layer form, whose gradients they are, clipped alike."""
    make_optimizer = OPTIMIZERS["sgd"]
    layers, attached = (f(make_optimizer, **OPTIONS) for f in (LayerForm, OptimizerForm))
    for x, y in batches(4):
        for form in (layers, attached):
            F.cross_entropy(form.model(x), y).backward()
        attached.decor.transform_gradients()
        attached.decor.transform_gradients()  # once is enough, twice does no harm
        for ours, theirs in zip(attached.model.parameters(), layers.model.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
        for form in (layers, attached):
            nn.utils.clip_grad_norm_(form.model.parameters(), 0.1)
            form.optimizer.step()
            if form is layers:
                form.decor.step()
            form.optimizer.zero_grad(set_to_none)
    assert_equal(layers, attached)
