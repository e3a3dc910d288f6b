"""The precision of float32 products: torch's two interfaces to it, and the update's own."""

import pytest
import torch

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import precision
from dbp_kernels import update as update_module
from dbp_kernels.budget import Budget

MATMUL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def now() -> tuple[str, str]:
    return tuple(backend.fp32_precision for backend in MATMUL)


@pytest.fixture(autouse=True)
def _restored():
    before = now()
    yield
    for backend, value in zip(MATMUL, before):
        backend.fp32_precision = value


@pytest.fixture
def seen(monkeypatch) -> list:
    """The precision at every call of what computes updates, and of what writes them."""
    seen = []

    def watched(name):
        real = getattr(update_module, name)

        def call(*arguments):
            seen.append(now())
            return real(*arguments)

        monkeypatch.setattr(update_module, name, call)

    watched("local_updates")
    watched("write_back")
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


@pytest.mark.parametrize("value", ["low", "tf32", 1, ["high"]])
def test_bad_precisions(value):
    layer = dnn.DecorLinear(3, 2)
    with pytest.raises(ValueError, match=r"^matmul_precision=.*'highest'"):
        dbp.DecorUpdate(layer, matmul_precision=value)
    assert layer._recorder is None
