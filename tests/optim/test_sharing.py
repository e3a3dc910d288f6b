"""Layers fed by the same tensor share one R and one set of samples, and nothing else changes by it."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from attach_forms import OPTIMIZERS, OPTIONS
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.checkpoint import checkpoint

import dbp_kernels as dbp
from dbp_kernels import sampling
from dbp_kernels.optim import decor_update
from dbp_kernels.sampling import Inputs


class Block(nn.Module):
    """Attention and a gated MLP, with switches for what tells q, k and v apart."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down = nn.Linear(12, 4)
        self.key_input = lambda x: x
        self.with_value = True

    def forward(self, x):
        x = torch.tanh(self.embed(x))
        q, k = self.q(x), self.k(self.key_input(x))
        v = self.v(x) if self.with_value else x
        x = x + F.scaled_dot_product_attention(q, k, v)
        return self.down(F.silu(self.gate(x)) * self.up(x)).mean(1)


LAYERS = ("embed", "q", "k", "v", "gate", "up", "down")


class Form:
    """The block in training; ``shares=False``: every layer has samples and R of its own."""

    def __init__(self, shares=True, optimizer="adamw", model=Block, **options):
        torch.manual_seed(0)
        self.model = model().double()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.decor = dbp.attach(self.model, self.optimizer, **{**OPTIONS, **options})
        if not shares:
            self.decor._engine._inputs = None

    def backward(self, seed, images=6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(images, 7, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (images,), generator=generator)
        loss = F.cross_entropy(self.model(x.to(self.model.q.weight.dtype)), y)
        loss.backward()
        return loss.detach()

    def step(self, *seeds, **options):
        for seed in seeds:
            self.backward(seed, **options)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def shared(self, *names):
        return len({id(self.decor.R(name)) for name in names}) == 1

    def recorder(self, name):
        return sampling.recorder_of(self.decor._site(name))


def assert_equal(form, other, tolerance=1e-12):
    for name in LAYERS:
        for get in (lambda f, n: f.model.get_submodule(n).weight, lambda f, n: f.decor.W(n)):
            torch.testing.assert_close(
                get(form, name), get(other, name), rtol=tolerance, atol=tolerance, msg=name
            )
        R, theirs = form.decor.R(name), other.decor.R(name)
        torch.testing.assert_close(R, theirs, rtol=tolerance, atol=tolerance, msg=name)
    for tell in ("losses", "skipped"):
        ours, theirs = getattr(form.decor, tell)(), getattr(other.decor, tell)()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def both(change=None, before=3, after=3, **options):
    """A form that shares and one that does not, trained alike; ``change`` comes in between."""
    forms = [Form(shares, **options) for shares in (True, False)]
    for form in forms:
        for n in range(before):
            form.step(2 * n, 2 * n + 1)
            form.decor._engine._phases = forms[0].decor._engine._phases  # costs are others
        if change is not None:
            assert form is forms[1] or form.shared("q", "k", "v")
            change(form)
        for n in range(before, before + after):
            form.step(2 * n, 2 * n + 1)
    assert_equal(*forms)
    assert not any(forms[1].shared("q", name) for name in ("k", "v"))
    moved = forms[0].decor.R("q") - torch.eye(8, dtype=torch.float64)
    assert moved.abs().max() > 1e-3
    return forms[0]


@pytest.mark.parametrize("name", ["sgd", "adamw, fused"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"demean": True, "rule": "normalized", "kappa": 0.1},
        {"update_every": 3},
        {"update_every": 3, "stagger": False},
        {"sample": 1.0},
    ],
    ids=lambda o: ", ".join(o) or "defaults",
)
def test_sharing_is_exact(name, options):
    form = both(after=5, optimizer=name, **options)
    assert form.shared("q", "k", "v")
    assert form.shared("gate", "up")
    assert not form.shared("q", "gate")
    assert not form.shared("q", "embed")


def test_equals_the_layer_form():
    form = Form(optimizer="adamw")
    torch.manual_seed(0)
    layers = dbp.decorrelate_model(Block().double())
    optimizer = OPTIMIZERS["adamw"](layers.parameters())
    decor = dbp.DecorUpdate(layers, **OPTIONS)
    other = Form.__new__(Form)
    other.model = layers
    for n in range(20):
        form.step(n)
        other.backward(n)
        optimizer.step()
        decor.step()
        optimizer.zero_grad()
    for name in LAYERS:
        layer = layers.get_submodule(name)
        torch.testing.assert_close(form.decor.R(name), layer.R, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(form.decor.W(name), layer.weight, rtol=1e-12, atol=1e-12)
    assert form.shared("q", "k", "v")


def test_a_third_of_the_samples_and_updates(monkeypatch):
    form = Form()
    for n in range(3):
        form.backward(n)
        samples = [form.recorder(name).samples for name in "qkv"]
        assert samples[0][0] is samples[1][0] is samples[2][0]
        assert sum(map(len, samples)) == 3
        assert [held is not None for held in form.recorder("k")._buffers] == [False]
        jobs, _ = form.decor._engine._due_jobs()
        assert len(jobs) == 4
        form.step()


# What tells layers apart.


def other_key_input(form):
    form.model.key_input = lambda x: 2 * x


def equal_key_input(form):
    form.model.key_input = torch.clone


def key_input_written_in_place(form):
    form.model.key_input = lambda x: x.mul_(1.5)


def key_input_of_another_dtype_of_the_same_memory(form):
    form.model.key_input = lambda x: x.view(torch.complex128).view(torch.float64).flip(1)


def frozen(form):
    form.model.k.weight.requires_grad_(False)


def not_called(form):
    form.model.with_value = False


def not_called_in_one_pass(form):
    form.model.with_value = False
    form.backward(100)
    form.model.with_value = True


def no_passes_in_common(form):
    form.model.with_value = False
    form.backward(100)
    form.model.with_value = True
    form.model.key_input = lambda x: x + 1
    form.backward(101)
    form.model.key_input = lambda x: x


@pytest.mark.parametrize(
    ("change", "together"),
    [
        (other_key_input, "qv"),
        (equal_key_input, "qv"),
        (key_input_of_another_dtype_of_the_same_memory, "qv"),
        (frozen, "qv"),
        (not_called, "qk"),
        (not_called_in_one_pass, "qk"),
        (no_passes_in_common, ""),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_tells_layers_apart(change, together):
    form = both(change)
    assert not form.shared("q", "k", "v")
    assert form.shared(*together or "q")
    assert form.shared("gate", "up")


def test_an_input_written_to_in_place_is_another_one():
    """The version tells: memory and layout stay."""

    class Written(Block):
        def forward(self, x):
            x = torch.tanh(self.embed(x)).detach()
            q = self.q(x.clone())
            k = self.k(x)
            v = self.v(x.mul_(1.5))
            x = F.scaled_dot_product_attention(q, k.detach(), v)
            return self.down(F.silu(self.gate(x)) * self.up(x)).mean(1)

    for shares in (True, False):
        form = Form(shares, model=Written)
        form.model.k.weight.requires_grad_(True)
        with torch.no_grad():
            form.model.k.bias.zero_()
        x = torch.randn(6, 7, 5, dtype=torch.float64)
        form.model(x)
        k, v = (form.recorder(name).samples[0] for name in "kv")
        torch.testing.assert_close(v, 1.5 * k)


def test_memory_given_to_another_tensor_is_not_mistaken():
    """A freed input's address is reused at once on CPUs; the same shape, strides and version."""
    form = Form()
    q, k = form.model.q, form.model.k
    addresses = set()
    for n in range(20):
        x = torch.full((6, 7, 8), float(n), dtype=torch.float64)
        addresses.add(x.data_ptr())
        (q if n % 2 else k)(x)
        del x
    assert len(addresses) < 20
    for name, odd in (("q", 1), ("k", 0)):
        values = [float(sample[0, 0, 0]) for sample in form.recorder(name).samples]
        assert values == [n for n in range(20) if n % 2 == odd]


def test_options_of_one_layer_tell_it_apart():
    form = Form(groups=[{"modules": ["k"], "lr": 1e-3}])
    form.step(0)
    assert form.shared("q", "v")
    assert not form.shared("q", "k")


def test_options_that_change_tell_layers_apart():
    def change(form):
        form.decor._engine.param_groups[0]["kappa"] = 0.9

    form = both(change, groups=[{"modules": ["k"]}])
    assert form.shared("q", "v")
    assert not form.shared("q", "k")


def test_a_layer_called_twice_counts_twice():
    class Twice(Block):
        def forward(self, x):
            x = torch.tanh(self.embed(x))
            v = self.v(x) + self.v(x)
            x = F.scaled_dot_product_attention(self.q(x), self.k(x), v)
            return self.down(F.silu(self.gate(x)) * self.up(x)).mean(1)

    forms = [Form(shares, model=Twice) for shares in (True, False)]
    for form in forms:
        for n in range(3):
            form.backward(n)
            assert len(form.recorder("v").samples) == 2
            form.step()
    assert_equal(*forms)
    assert forms[0].shared("q", "k")
    assert not forms[0].shared("q", "v")


def test_random_samples_are_drawn_once_for_layers_that_share():
    form = Form(sampling="random")
    for n in range(2):
        form.step(n)
    assert form.shared("q", "k", "v")
    x = torch.randn(20, 7, 8, dtype=torch.float64)
    for _ in range(2):
        form.model.q(x)
        form.model.k(x)
    assert not torch.equal(*form.recorder("q").samples)
    assert all(a is b for a, b in zip(form.recorder("q").samples, form.recorder("k").samples))


def test_layers_that_share_take_the_turn_of_the_first(monkeypatch):
    """Whose cost is that of all."""
    monkeypatch.setattr(decor_update, "phases", lambda costs, periods: [*range(len(costs))])
    form = Form(update_every=7)
    form.step(0)
    names = [name for name, _ in form.decor._engine._named_layers()]
    turns = dict(zip(names, form.decor._engine._phases, strict=True))
    assert turns["q"] == turns["k"] == turns["v"] == names.index("q")
    assert turns["up"] == turns["gate"] == names.index("gate")


def test_with_a_budget_every_layer_is_by_itself():
    form = Form(budget=0.3, costs="planned")
    form.step(0)
    assert not form.shared("q", "k")


# Samples.


def test_a_lent_sample_is_not_written_to_before_all_have_dropped_it(monkeypatch):
    """Where zero_grad() drops the first layer's samples, as its gradient has come, alone."""
    form = Form(sample=1.0)
    x = torch.randn(6, 7, 8, dtype=torch.float64)
    q, k = form.model.q, form.model.k
    loss = q(x).sum()
    k(x)
    loss.backward()
    form.optimizer.zero_grad()
    assert form.recorder("q").samples == []
    (kept,) = form.recorder("k").samples
    q(torch.zeros_like(x))
    assert torch.equal(kept, x)
    v_input = x  # the first layer's sample is gone, and so is what it was known by
    form.model.v(v_input)
    assert form.recorder("v").samples[0] is not kept
    assert torch.equal(form.recorder("v").samples[0], x)


def test_no_more_than_the_last_passes_are_kept(monkeypatch):
    monkeypatch.setattr(sampling, "MAX_PENDING", 3)
    forms = [Form(shares) for shares in (True, False)]
    for form in forms:
        form.step(0)
        with pytest.warns(RuntimeWarning, match="called 4 times"):
            form.step(1, 2, 3, 4, 5)
    assert_equal(*forms)
    assert forms[0].shared("q", "k", "v")


def test_memory_stays_from_step_to_step():
    form = Form()
    seen = []
    for n in range(4):
        form.backward(n)
        form.backward(n + 10)
        seen.append([s.data_ptr() for name in "qkv" for s in form.recorder(name).samples])
        form.step()
    assert seen == 4 * [seen[0]]


def test_nothing_is_kept_alive_for_it():
    form = Form()
    form.step(0)
    assert form.decor._engine._inputs._taken == {}
    form.backward(1)
    form.decor.detach()
    assert form.decor._engine._inputs._taken == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    def wrap(form):
        inner = form.model.forward
        form.model.forward = lambda x: checkpoint(
            inner, x.requires_grad_(), use_reentrant=reentrant
        )

    form = both(wrap)
    assert form.shared("q", "k", "v")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_do_not_share(backend):
    torch._dynamo.reset()

    def compiled(form):
        form.model.forward = torch.compile(form.model.forward, backend=backend)

    forms = [Form(shares) for shares in (True, False)]
    for form in forms:
        compiled(form)
        for n in range(3):
            form.step(n)
    assert_equal(*forms, tolerance=1e-9)
    assert not forms[0].shared("q", "k")


def test_a_batch_that_is_not_finite_is_skipped_by_all():
    def broken(form):
        x = torch.full((6, 7, 8), torch.nan, dtype=torch.float64)
        for layer in (form.model.q, form.model.k, form.model.v):
            layer(x)

    form = both(broken)
    assert form.shared("q", "k", "v")
    assert {name: int(form.decor.skipped()[name]) for name in "qkv"} == dict.fromkeys("qkv", 1)


# Reports, checkpoints, copies.


def test_repr_says_which_layers_share():
    form = Form()
    form.step(0)
    told = form.decor.decorrelated()
    assert told["q"].startswith("R ")
    assert told["k"] == told["v"] == "R is that of 'q'"
    assert told["up"] == "R is that of 'gate'"
    assert list(told) == list(LAYERS)
    assert "k: R is that of 'q'" in repr(form.decor)


def saved(form):
    file = io.BytesIO()
    torch.save({"model": form.model.state_dict(), "optimizer": form.optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load(form, state):
    form.model.load_state_dict(state["model"])
    form.optimizer.load_state_dict(state["optimizer"])


@pytest.mark.parametrize("saving", [True, False])
@pytest.mark.parametrize("loading", [True, False])
@pytest.mark.parametrize("trained", [0, 2])
def test_checkpoints_load_in_all_directions(saving, loading, trained):
    first, second = Form(saving), Form(loading)
    for n in range(3):
        first.step(n)
    for n in range(trained):
        second.step(50 + n)
    load(second, saved(first))
    assert_equal(first, second, tolerance=0)
    for form in (first, second):
        for n in range(3, 6):
            form.step(n)
    assert_equal(first, second, tolerance=0 if saving == loading else 1e-12)
    assert second.shared("q", "k", "v") == loading


def test_a_checkpoint_with_different_Rs_tells_layers_apart():
    first, second = Form(), Form()
    first.model.key_input = lambda x: x + 1
    for form in (first, second):
        form.step(0)
    assert second.shared("q", "k", "v")
    load(second, saved(first))
    assert_equal(first, second, tolerance=0)
    second.step(1)
    assert not second.shared("q", "k")
    assert second.shared("q", "v")


def test_a_distributed_checkpoint_with_different_Rs_tells_layers_apart(tmp_path):
    """It is loaded into the tensors of the state that is there, in which layers share."""
    first, second = Form(), Form()
    first.model.key_input = lambda x: x + 1
    for form in (first, second):
        form.step(0)
    assert second.shared("q", "k", "v")
    ours, theirs = (get_optimizer_state_dict(f.model, f.optimizer) for f in (first, second))
    dcp.save(ours, checkpoint_id=tmp_path)
    dcp.load(theirs, checkpoint_id=tmp_path)
    second.model.load_state_dict(first.model.state_dict())
    set_optimizer_state_dict(second.model, second.optimizer, theirs)
    assert_equal(first, second, tolerance=0)


def test_a_plain_checkpoint_sets_all_back_to_the_identity():
    form = Form()
    plain = OPTIMIZERS["adamw"](Block().double().parameters())
    form.step(0)
    with pytest.warns(UserWarning, match="no R of"):
        form.optimizer.load_state_dict(plain.state_dict())
    assert all(torch.equal(form.decor.R(n), torch.eye(8, dtype=torch.float64)) for n in "qkv")
    form.step(1)
    assert form.shared("q", "k", "v")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_share_among_themselves(copied):
    form = Form()
    del form.model.key_input
    form.model.key_input = nn.Identity()
    for n in range(2):
        form.step(n)
    twin = Form.__new__(Form)
    twin.model, twin.optimizer, twin.decor = copied((form.model, form.optimizer, form.decor))
    assert twin.shared("q", "k", "v")
    assert twin.decor.R("q") is not form.decor.R("q")
    before = form.decor.R("q").clone()
    twin.step(2)
    assert torch.equal(form.decor.R("q"), before)
    form.step(2)
    assert_equal(form, twin, tolerance=0)
    assert twin.shared("q", "k", "v")


def test_moving_the_model_keeps_sharing():
    form = Form(optimizer="sgd")
    form.step(0)
    losses = form.decor.losses()
    form.model.float()
    form.step(1)
    assert form.decor.R("q").dtype == torch.float32
    assert form.shared("q", "k", "v")
    assert form.decor.losses().keys() == losses.keys()
    form.model.double()
    form.step(2)
    assert form.shared("q", "k", "v")
    form.model.k.float()
    form.model.key_input = torch.Tensor.float
    form.model.k.register_forward_hook(lambda m, x, y: y.double())
    form.step(2)
    assert form.decor.R("k").dtype == torch.float32
    assert form.decor.R("q").dtype == torch.float64
    assert form.shared("q", "v")


def test_inputs_are_known_by_memory_layout_and_version():
    x = torch.randn(4, 6)
    key = Inputs.key(x)
    assert Inputs.key(x.detach()) == key
    assert Inputs.key(x.view(4, 6)) == key
    assert Inputs.key(x.view(6, 4)) != key
    assert Inputs.key(x[1:]) != key
    assert Inputs.key(x.t().t()) == key
    assert Inputs.key(x.clone()) != key
    x.add_(1)
    assert Inputs.key(x) != key
    assert Inputs.key(x.to_sparse()) is None
    with torch.inference_mode():
        assert Inputs.key(torch.ones(2, 2)) is None


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    form = Form()
    if rank:
        form.model.key_input = lambda x: x + 1  # only this rank would tell k apart
    form.step(rank)
    form.step(2 + rank)
    torch.save({name: form.decor.R(name) for name in LAYERS}, f"{folder}/{rank}.pt")
    assert not form.shared("q", "v")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_with_several_ranks_every_layer_is_by_itself(tmp_path):
    mp.spawn(rank_main, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in LAYERS:
        assert torch.equal(first[name], second[name])
    torch.testing.assert_close(first["q"], first["v"], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first["q"], first["k"])
