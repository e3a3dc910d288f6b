"""Writing updates back: large R in place, and few launches on a GPU."""

from collections import Counter

import pytest
import torch
from decor_layers import D64, expected, fresh, patches
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import rules
from dbp_kernels.optim import write_back
from dbp_kernels.optim.step import local_updates


def test_few_samples_change_a_large_R_in_place():
    """No other D x D tensor is made, which would cost memory and passes over it."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != layer.R.data_ptr():
                largest.append(result.numel())
            return result

    layer = dnn.DecorLinear(300, 2)
    update = dbp.DecorUpdate(layer, lr=1e-3, sample=1.0)
    x = torch.randn(4, 300)
    layer(x)
    with Sizes():
        update.step()
    assert 0 < max(largest) < 300 * 300
    R, _ = expected(x[None], torch.eye(300), 1e-3, 0.5)
    torch.testing.assert_close(layer.R, R.float(), rtol=1e-5, atol=1e-6)


LARGE = [
    (dnn.DecorLinear(300, 2), (4, 300)),
    (dnn.DecorConv2d(64, 4, 3, groups=2), (2, 64, 4, 4)),
    (dnn.DecorConv3d(35, 4, 2), (3, 35, 2, 2, 3)),
]


@pytest.mark.parametrize("on_host", [True, False], ids=["CPU", "GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("demean", [False, True])
@pytest.mark.parametrize("batches", [1, 100])
def test_large_layers_in_place(batches, dtype, demean, on_host, monkeypatch):
    """As on a CPU, and by tensors that decide, as on a GPU; one of the layers is poisoned.

    One batch has fewer patches than D, a hundred have more, which is for other plans.
    """
    monkeypatch.setattr(write_back, "_on_host", lambda x: on_host)
    used, apply_ = [], rules.Update.apply_

    def watched(update, R, *arguments):
        used.append(R)
        assert (update.few is not None) == (batches == 1)
        apply_(update, R, *arguments)

    monkeypatch.setattr(rules.Update, "apply_", watched)
    net = nn.ModuleList(fresh(layer, dtype) for layer, _ in [*LARGE, LARGE[0]])
    update = dbp.DecorUpdate(net, lr=1e-3, kappa=0.3, sample=1.0, demean=demean)
    before = [layer.R.clone() for layer in net]
    shapes = [(batches * images, *rest) for _, (images, *rest) in [*LARGE, LARGE[0]]]
    # what autocast rounds the samples to
    inputs = [torch.randn(shape).bfloat16().to(dtype) for shape in shapes]
    inputs[-1][0, 0] = float("nan")
    with torch.autocast("cpu", torch.bfloat16):
        for layer, x in zip(net, inputs):
            layer(x)
        update.step()
    changed = net[:-1] if on_host else net  # a GPU's poisoned update changes R by nothing
    assert [R.data_ptr() for R in used] == [layer.R.data_ptr() for layer in changed]
    assert [int(v) for v in update.skipped().values()] == [0, 0, 0, 1]
    assert torch.equal(net[-1].R, before[-1])
    tolerance = 1e-12 if dtype == D64 else 1e-5
    for layer, x, R, loss in zip(net[:-1], inputs, before, update.losses().values()):
        R_new, expected_loss = expected(patches(layer, x), R, 1e-3, 0.3, demean=demean)
        torch.testing.assert_close(layer.R.to(D64), R_new, rtol=0, atol=tolerance)
        torch.testing.assert_close(loss.to(D64), expected_loss, rtol=10 * tolerance, atol=0)


def test_writing_back_on_a_GPU_takes_few_launches_however_many_layers(monkeypatch):
    """Equal layers share those that change R, and all share the checks."""
    monkeypatch.setattr(write_back, "_on_host", lambda x: False)
    names = (
        "view.default",
        "unbind.int",
        "alias.default",
        "split.Tensor",
        "split_with_sizes.default",
    )
    views = {f"aten.{name}" for name in (*names, "select.int", "slice.Tensor", "expand.default")}
    launches = []
    for layers in (2, 9):
        net = nn.ModuleList(dnn.DecorLinear(16, 2) for _ in range(layers))
        update = dbp.DecorUpdate(net, lr=1e-3, sample=1.0)
        for _ in range(2):  # the first time makes the reports
            for layer in net:
                layer(torch.randn(4, 16))
            with torch.no_grad():
                jobs, _ = update._due_jobs()
                batches = local_updates(jobs)
                with Calls() as calls:
                    update._carry_out(jobs, batches)
            update.discard()
        counted = Counter(calls.names)
        launches.append({name: n for name, n in counted.items() if name not in views})
    assert launches[0] == launches[1]
    assert sum(launches[0].values()) < 40


class Calls(TorchDispatchMode):
    """The names of all operators called, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
