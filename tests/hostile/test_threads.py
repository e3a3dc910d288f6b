"""Threads that train at once: each as if it were alone, and torch's settings as they were."""

import copy
import random
import signal
import sys
import threading

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import precision

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def now():
    return CUDA.fp32_precision, CPU.fp32_precision


@pytest.fixture(autouse=True)
def _changing_often():
    """Threads take turns as often as Python lets them; torch's settings are there for the next test."""
    interval, before = sys.getswitchinterval(), now()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    CUDA.fp32_precision, CPU.fp32_precision = before


def at_once(works):
    """Each function's result, of threads that run them. Raises the first error of any; none may hang."""
    results, errors, start = [None] * len(works), [], threading.Barrier(len(works))

    def guarded(place, work):
        start.wait(60)
        try:
            results[place] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=own, daemon=True) for own in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return results


# What blocks there are, and the precisions on CUDA and on CPUs within each: "full" that of float32, as
# it was set if it was no lower, None that of the block around.
BLOCKS = {
    "medium": (lambda: precision.matmul_precision("medium"), ("tf32", "bf16")),
    "high": (lambda: precision.matmul_precision("high"), ("tf32", "tf32")),
    "highest": (lambda: precision.matmul_precision("highest"), ("ieee", "ieee")),
    "update": (lambda: precision.update_precision(None, True), ("full", "full")),
    "update on a CPU": (lambda: precision.update_precision(None, False), (None, "full")),
    "product": (precision.tf32_products, ("tf32", None)),
}


class Visitor:
    """Enters blocks within each other, and leaves some by an error.

    Args:
        rng: decides which.
        found: what torch was set to.
    """

    def __init__(self, rng: random.Random, found: tuple[str, str]) -> None:
        self.rng = rng
        self.full = tuple("none" if f == "none" else "ieee" for f in found)

    def visit(self, around: tuple[str | None, str | None] = (None, None), depth: int = 0) -> None:
        make, needs = BLOCKS[self.rng.choice(list(BLOCKS))]
        inside = tuple(
            outer if own is None else full if own == "full" else own
            for own, full, outer in zip(needs, self.full, around)
        )
        try:
            with make():
                for _ in range(3):
                    self.check(inside)
                    if depth < 3 and self.rng.random() < 0.6:
                        self.visit(inside, depth + 1)
                if self.rng.random() < 0.3:
                    raise KeyError
        except KeyError:
            pass
        self.check(around)

    @staticmethod
    def check(expected: tuple[str | None, str | None]) -> None:
        for seen, own in zip(now(), expected):
            assert own in (None, seen)


@pytest.mark.kind("threads")
def test_every_block_has_its_precision_and_leaves_torchs(campaign):
    for rng in campaign.cases(300):
        found = rng.choice(("none", "ieee", "tf32")), rng.choice(("none", "ieee", "tf32", "bf16"))
        CUDA.fp32_precision, CPU.fp32_precision = found
        visitors = [Visitor(random.Random(rng.random()), found) for _ in range(rng.choice((2, 3)))]
        at_once([visitor.visit for visitor in visitors])
        assert now() == found


class Alarm(Exception):
    pass


@pytest.fixture
def alarm():
    """Has a signal's handler raise Alarm after so many seconds."""

    def ring(number, frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.kind("signals")
def test_interrupted_blocks_are_over_at_the_next_one(campaign, alarm):
    for rng in campaign.cases(1000):
        try:
            alarm(rng.uniform(1e-6, 5e-5))
            for _ in range(100):  # it has rung by then, be it where an error is lost
                name = rng.choice(("medium", "high", None))
                with precision.update_precision(name, True), precision.tf32_products():
                    pass
            alarm(0)
        except Alarm:
            pass
        with precision.matmul_precision("highest"):
            assert now() == ("ieee", "ieee")
        assert now() == ("none", "none")
        assert not precision.by_default()

    def enter():
        with precision.tf32_products():
            return now()[0]

    assert at_once([enter]) == ["tf32"]  # no lock is left


def make_net(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A small network of sizes that no other case has likely planned for, and its input's shape."""
    a, b = rng.randint(3, 40), rng.randint(3, 40)
    if rng.random() < 0.5:
        net = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, b), nn.ReLU(), nn.Linear(b, 3))
        return net, (rng.randint(4, 40), a)
    net = nn.Sequential(
        nn.Conv2d(2, 4, rng.choice((2, 3)), padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten()
    )
    return net, (rng.randint(4, 8), 2, rng.randint(5, 12), rng.randint(5, 12))


OPTIONS = {
    "sampling": ("first", "random"),
    "update_every": (1, 3),
    "stagger": (False, True),
    "budget": (None, None, 0.3),
    "demean": (False, True),
    "rule": ("standard", "normalized"),
    "sample": (0.5, 1.0),
}


class Training:
    """One training, step by step: by attach, or of decorrelated layers."""

    def __init__(self, rng: random.Random) -> None:
        torch.manual_seed(rng.randrange(2**32))
        self.net, shape = make_net(rng)
        self.batches = [torch.randn(shape) for _ in range(6)]
        self.options = {key: rng.choice(values) for key, values in OPTIONS.items()}
        self.attach = rng.random() < 0.5

    def run(self) -> dict[str, torch.Tensor]:
        """Everything it has learnt."""
        net = copy.deepcopy(self.net)
        options = {"lr": 1e-2, "costs": "planned", **self.options}
        if not self.attach:
            net = dbp.decorrelate_model(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        decor = (
            dbp.attach(net, optimizer, **options)
            if self.attach
            else dbp.DecorUpdate(net, **options)
        )
        for x in self.batches:
            net(x).square().mean().backward()
            optimizer.step()
            if not self.attach:
                decor.step()
            optimizer.zero_grad()
        learnt = {**net.state_dict(), **{f"loss {k}": v for k, v in decor.losses().items()}}
        if self.attach:
            for name in decor.decorrelated():
                learnt |= {f"R {name}": decor.R(name), f"W {name}": decor.W(name)}
        return learnt


@pytest.mark.kind("threads")
def test_trainings_at_once_equal_each_alone(campaign):
    for rng in campaign.cases(100):
        trainings = [Training(rng) for _ in range(rng.choice((2, 2, 3)))]
        together = at_once([training.run for training in trainings])
        for training, found in zip(trainings, together):
            alone = training.run()
            assert found.keys() == alone.keys()
            for key, value in alone.items():
                assert torch.equal(found[key], value), (key, training.options)
