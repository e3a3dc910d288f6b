"""The precision of float32 products: torch's two interfaces to it, and the update's own."""

import os
import signal
import threading
from contextlib import ExitStack

import pytest
import torch
from helpers import Products, products_of_change
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import precision, rules
from dbp_kernels.optim import decor_update as update_module
from dbp_kernels.optim.budget import Budget

MATMUL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def now() -> tuple[str, str]:
    return tuple(backend.fp32_precision for backend in MATMUL)


@pytest.fixture(autouse=True)
def _restored():
    """Each test finds torch's setting as it is at first, whatever tests of other files have left."""
    before = now()
    for backend in MATMUL:
        backend.fp32_precision = "none"
    yield
    for backend, value in zip(MATMUL, before):
        backend.fp32_precision = value


@pytest.fixture
def seen(monkeypatch) -> list:
    """The precision at every call of what computes updates, and of what writes them."""
    seen = []

    def watched(owner, name):
        real = getattr(owner, name)

        def call(*arguments):
            seen.append(now())
            return real(*arguments)

        monkeypatch.setattr(owner, name, call)

    watched(update_module, "local_updates")
    watched(update_module.WriteBack, "__call__")
    return seen


def test_a_budget_plans_in_the_updates_precision(monkeypatch):
    seen = []
    monkeypatch.setattr(Budget, "plan", lambda *arguments: seen.append(now()))
    layer = dnn.DecorLinear(30, 2)
    update = dbp.DecorUpdate(layer, budget=0.1, matmul_precision="high")
    layer(torch.randn(64, 30))
    update.step()
    assert seen == [precision.MATMUL_PRECISIONS["high"]]


def test_tf32_follows_either_interface():
    torch.set_float32_matmul_precision("high")
    assert precision.tf32()
    torch.set_float32_matmul_precision("highest")
    assert not precision.tf32()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="legacy and new"):  # why it is not asked
        torch.get_float32_matmul_precision()
    assert precision.tf32()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not precision.tf32()


@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_names_mean_what_torch_means_by_them(name):
    torch.set_float32_matmul_precision(name)
    expected = now()
    torch.set_float32_matmul_precision("highest")
    with precision.matmul_precision(name):
        assert now() == expected


@pytest.mark.parametrize("set_to", ["none", "ieee", "tf32"])
def test_an_updates_products_by_name(set_to):
    torch.backends.cuda.matmul.fp32_precision = set_to
    outside = "tf32" if set_to == "tf32" else "ieee"
    expected = {"highest": "ieee", "high": "tf32", "medium": "tf32", None: "tf32x3"}
    assert precision.update_products() == outside
    for name, products in expected.items():
        with precision.update_precision(name, True):
            assert precision.update_products() == products
    for products in ("ieee", "tf32x3", "tf32"):
        with precision.products_in(products):
            assert precision.update_products() == products
    assert precision.update_products() == outside


@pytest.mark.parametrize("name", [*precision.MATMUL_PRECISIONS, None])
def test_an_update_of_its_own_precision_leaves_torchs_alone(name, seen):
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # by the new interface
    before = now()
    layer = dnn.DecorLinear(300, 2)
    update = dbp.DecorUpdate(layer, lr=0.1, sample=1.0, matmul_precision=name)
    layer(torch.randn(64, 300))
    update.step()
    assert now() == before
    assert seen == 2 * [precision.MATMUL_PRECISIONS.get(name, before)]


def test_an_error_restores_torchs_precision():
    before = now()
    with pytest.raises(KeyError), precision.matmul_precision("medium"):
        raise KeyError(now())
    assert now() == before


@pytest.mark.parametrize("samples", [64, 1000])  # plan "samples", and one with second moments
def test_a_low_precision_is_near_the_full_one(samples):
    x = torch.randn(samples, 300, generator=torch.Generator().manual_seed(0))
    changes = []
    for name in ("highest", "medium"):
        layer = dnn.DecorLinear(300, 2)
        update = dbp.DecorUpdate(layer, lr=1e-2, sample=1.0, matmul_precision=name)
        layer(x)
        update.step()
        changes.append(layer.R - torch.eye(300))
    difference = (changes[1] - changes[0]).norm() / changes[0].norm()
    assert difference < 2**-7  # bfloat16 rounds to 2^-9 of a number; not all CPUs make use of it


# Which product of an update runs in which precision: on CPU tensors in CUDA's place, where settings
# for CUDA take no effect and are recorded.


@pytest.fixture
def as_cuda(monkeypatch):
    """What asks whether it is on CUDA is told so; torch is set to TF32 there."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    monkeypatch.setattr(precision, "on_cuda", lambda x: True)


# {plan: images that make it the planner's choice at D = 300, on most CPUs}
PLANS = {"samples": 4, "direct": 280, "gram": 700}
every_plan = pytest.mark.parametrize("images", PLANS.values(), ids=PLANS)


def products_of_step(layers: list[nn.Module], inputs: list[torch.Tensor], **options) -> list[str]:
    """The precisions of a step's products, in their order."""
    update = dbp.DecorUpdate(nn.ModuleList(layers), lr=1e-2, sample=1.0, **options)
    for layer, x in zip(layers, inputs):
        layer(x)
    before = now()
    with Products() as products:
        update.step()
    assert now() == before
    return products.seen


def check_default(seen: list[str], last: int) -> None:
    assert len(seen) > last
    assert seen[-last:] == ["tf32"] * last
    assert set(seen[:-last]) == {"ieee"}


@every_plan
def test_by_default_only_what_changes_R_is_in_tf32(images, as_cuda):
    seen = products_of_step([dnn.DecorLinear(300, 2)], [torch.randn(images, 300)])
    check_default(seen, products_of_change(images, 300))


@pytest.mark.parametrize(
    ("size", "images"), [(200, 4), (30, 40), (60, 3000)], ids=["samples", "direct", "gram"]
)
def test_layers_updated_together_too(size, images, as_cuda):
    layers = [dnn.DecorLinear(size, 2) for _ in range(3)]
    seen = products_of_step(layers, [torch.randn(images, size) for _ in layers])
    check_default(seen, products_of_change(images, size))
    assert len(seen) < 3 * 3  # not one by one


def test_moments_of_batches_of_several_shapes_too(as_cuda):
    layer = dnn.DecorConv2d(3, 2, 3)
    update = dbp.DecorUpdate(layer, lr=1e-2, sample=1.0)
    for height in (9, 12):
        layer(torch.randn(8, 3, height, 9))
    with Products() as products:
        update.step()
    check_default(products.seen, 1)


def test_updates_beside_the_backward_pass_too(as_cuda):
    layer = dnn.DecorLinear(300, 2)
    update = dbp.DecorUpdate(layer, lr=1e-2, sample=1.0)
    layer(torch.randn(4, 300))
    before = now()
    with Products() as products, update.overlap():
        assert now() == before
    assert now() == before
    check_default(products.seen, products_of_change(4, 300))


@every_plan
@pytest.mark.parametrize("name", precision.MATMUL_PRECISIONS)
def test_a_name_is_for_all_products(name, images, as_cuda):
    x = torch.randn(images, 300)
    seen = products_of_step([dnn.DecorLinear(300, 2)], [x], matmul_precision=name)
    assert set(seen) == {precision.MATMUL_PRECISIONS[name][0]}


@every_plan
@pytest.mark.parametrize("set_to", ["ieee", "tf32"])
def test_operators_by_themselves_follow_torch(set_to, images, as_cuda):
    torch.backends.cuda.matmul.fp32_precision = set_to
    with Products() as products:
        dbp.decor_update(torch.randn(images, 300), torch.eye(300), (), lr=1e-2)
    assert set(products.seen) == {set_to}


def test_by_default_a_cpu_computes_in_float32_and_leaves_cuda_alone(seen):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    layer = dnn.DecorLinear(300, 2)
    update = dbp.DecorUpdate(layer, lr=0.1, sample=1.0)
    layer(torch.randn(64, 300))
    update.step()
    assert seen == 2 * [("tf32", "ieee")]
    assert now() == ("tf32", "bf16")


@pytest.mark.parametrize("parent", [torch.backends, torch.backends.cudnn])  # all, all of CUDA
def test_what_is_set_for_all_operations_is_still_followed_after_an_update(parent, as_cuda):
    torch.backends.cuda.matmul.fp32_precision = "none"
    with torch.backends.__allow_nonbracketed_mutation():  # which torch's own test tools forbid
        parent.fp32_precision = "tf32"
        try:
            layer = dnn.DecorLinear(300, 2)
            products_of_step([layer], [torch.randn(64, 300)])
            assert now()[0] == "tf32"
            parent.fp32_precision = "ieee"
            assert now()[0] == "ieee"
        finally:
            parent.fp32_precision = "none"


def test_precisions_within_each_other_end_one_by_one():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with precision.matmul_precision("highest"):
        with precision.tf32_products():
            assert now()[0] == "tf32"
        assert now()[0] == "ieee"
    assert now()[0] == "tf32"


# Threads: the setting is the whole process's.


class Thread:
    """A thread that is within a block from its start until ``leave()``."""

    def __init__(self, block) -> None:
        self.seen, self._end = None, threading.Event()
        self.entered = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(block,), daemon=True)
        self._thread.start()

    def _run(self, block) -> None:
        with block:
            self.seen = now()
            self.entered.set()
            self._end.wait(20)

    def leave(self) -> None:
        self._end.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("own", ["none", "ieee", "tf32"])
def test_threads_of_one_precision_compute_together_and_leave_torchs_as_it_was(own):
    """Each would restore what it found, and the last one has found another's TF32."""
    torch.backends.cuda.matmul.fp32_precision = own
    first, second = Thread(precision.tf32_products()), Thread(precision.tf32_products())
    assert first.entered.wait(20)
    assert second.entered.wait(20)
    first.leave()
    assert now()[0] == "tf32"
    second.leave()
    assert now()[0] == own


@pytest.mark.parametrize("name", ["highest", None])
def test_a_thread_waits_for_those_of_another_precision(name):
    first = Thread(precision.matmul_precision("medium"))
    assert first.entered.wait(20)
    second = Thread(precision.update_precision(name, False))
    assert not second.entered.wait(0.1)
    assert first.seen == now() == precision.MATMUL_PRECISIONS["medium"]
    first.leave()
    assert second.entered.wait(20)
    assert second.seen[1] in ("ieee", "none")
    second.leave()
    assert now() == ("none", "none")


def test_threads_that_both_change_their_precision_do_not_wait_for_each_other():
    both = threading.Barrier(2)

    def work(name: str, seen: list) -> None:
        with precision.update_precision(None, True):
            both.wait(20)
            with precision.matmul_precision(name):
                seen.append(now())
            seen.append(now())

    seen = {name: [] for name in ("high", "medium")}
    threads = [threading.Thread(target=work, args=item, daemon=True) for item in seen.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for name, own in seen.items():
        assert own == [precision.MATMUL_PRECISIONS[name], ("none", "none")]


def test_what_somebody_else_sets_meanwhile_stays():
    with precision.matmul_precision("medium"):
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert now() == ("ieee", "none")


def test_an_interrupt_while_waiting_leaves_the_thread_as_it_was():
    other = Thread(precision.matmul_precision("medium"))
    assert other.entered.wait(20)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt), precision.matmul_precision("highest"):
            pass
    finally:
        signal.signal(signal.SIGALRM, before)
    assert now() == other.seen
    other.leave()
    assert now() == ("none", "none")


def test_a_block_that_never_ends_is_over_once_it_is_gone():
    lost = precision.matmul_precision("medium")
    lost.__enter__()
    other = Thread(precision.matmul_precision("highest"))
    assert not other.entered.wait(0.2)
    del lost  # as with the frame that an interrupt has left before the block's end
    assert other.entered.wait(20)
    assert other.seen == ("ieee", "ieee")
    other.leave()
    lost = precision.matmul_precision("medium")
    lost.__enter__()
    del lost
    assert now() == ("none", "none")


def in_fork(check) -> bool:
    """Whether ``check()`` is true in a forked process."""
    child = os.fork()
    if child == 0:  # pytest must not go on in it
        try:
            fine = check()
        finally:
            os._exit(0 if fine else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_process_has_torchs_own_setting_whatever_threads_were_at():
    def check() -> bool:
        seen = [now()]
        with precision.matmul_precision("highest"):  # nobody is there to wait for
            seen.append(now())
        return [*seen, now()] == [("none", "none"), ("ieee", "ieee"), ("none", "none")]

    other = Thread(precision.matmul_precision("medium"))
    assert other.entered.wait(20)
    assert in_fork(check)
    assert now() == other.seen
    other.leave()


def test_a_process_forked_within_a_block_leaves_it_by_itself():
    with precision.matmul_precision("medium"), ExitStack() as stack:
        stack.enter_context(precision.matmul_precision("high"))
        inside = now()

        def check() -> bool:
            seen = [now()]
            stack.close()
            return [*seen, now()] == [inside, precision.MATMUL_PRECISIONS["medium"]]

        assert in_fork(check)
        assert now() == inside
    assert now() == ("none", "none")


def test_updates_of_other_precision_in_other_threads_change_no_bit():
    def updated(name: str | None, wait=lambda: None) -> torch.Tensor:
        layer = dnn.DecorLinear(300, 2)
        update = dbp.DecorUpdate(layer, lr=1e-3, sample=1.0, matmul_precision=name)
        for x in torch.randn(20, 64, 300, generator=torch.Generator().manual_seed(0)):
            layer(x)
            wait()
            update.step()
            wait()  # torch's own products, of the forward pass, may be in another's precision
        return layer.R.clone()

    alone = {name: updated(name) for name in ("medium", None)}
    together, both = {}, threading.Barrier(2, timeout=20)
    threads = [
        threading.Thread(target=lambda n=name: together.update({n: updated(n, both.wait)}))
        for name in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, R in alone.items():
        assert torch.equal(together[name], R), name


def test_an_error_ends_the_updates_precision(as_cuda, monkeypatch):
    monkeypatch.setattr(rules, "matmul", lambda X, Y: 1 / 0)
    update = dbp.DecorUpdate(layer := dnn.DecorLinear(300, 2), lr=0.1, sample=1.0)
    layer(torch.randn(4, 300))
    before = now()
    with pytest.raises(ZeroDivisionError):
        update.step()
    assert now() == before
    assert precision.update_products() == "tf32"  # torch's own


@pytest.mark.parametrize("value", ["low", "tf32", 1, ["high"]])
def test_bad_precisions(value):
    layer = dnn.DecorLinear(3, 2)
    with pytest.raises(ValueError, match=r"^matmul_precision=.*'highest'"):
        dbp.DecorUpdate(layer, matmul_precision=value)
    assert layer._recorder is None
