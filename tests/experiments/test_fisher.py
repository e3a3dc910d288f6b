"""Fisher matrices against their definitions, and the files of the experiment."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dbp_kernels as dbp
from experiments import fisher, fisher_matrix
from experiments.data import Split


def images(n: int) -> Split:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 8, 8, generator=g), torch.randint(10, (n,), generator=g)
    return Split(x, y, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def flat(derivatives: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten(2) for value in derivatives.values()], 2)


def test_the_models_matrix_is_the_hessian_of_a_linear_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    data = images(7)
    derivatives, logits = fisher_matrix.jacobian(model, data.x)
    matrix, gradient = fisher_matrix.fisher(flat(derivatives), logits, data.y, "model")

    def loss(weight):
        return F.cross_entropy(data.x.flatten(1).double() @ weight.view(10, 64).mT, data.y)

    weight = model[1].weight.detach().double().flatten()
    torch.testing.assert_close(matrix, torch.func.hessian(loss)(weight), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(weight), rtol=1e-9, atol=1e-12)


def test_the_empirical_matrix_is_the_mean_of_outer_products():
    torch.manual_seed(0)
    model = fisher.network((2, 3))
    data = images(5)
    derivatives, logits = fisher_matrix.jacobian(model, data.x)
    matrix, _ = fisher_matrix.fisher(flat(derivatives), logits, data.y, "empirical")
    expected = torch.zeros_like(matrix)
    double = fisher.network((2, 3)).double()
    double.load_state_dict(model.state_dict())
    for x, y in zip(data.x.double(), data.y):
        double.zero_grad()
        F.cross_entropy(double(x[None]), y[None]).backward()
        g = torch.cat([p.grad.flatten() for p in double.parameters()])
        expected += g.outer(g) / 5
    torch.testing.assert_close(matrix, expected, rtol=1e-9, atol=1e-14)


def test_derivatives_in_W_are_those_of_the_network_as_a_function_of_W():
    """Which is what the optimiser steps on, by the layer form: A = W R."""
    torch.manual_seed(0)
    plain = fisher.network((2, 3))
    layers = dbp.decorrelate_model(fisher.network((2, 3)))
    with torch.no_grad():
        for layer in (layers[0], layers[3], layers[7]):
            layer.R.add_(0.1 * torch.randn_like(layer.R))
    Rs = {f"{i}.weight": layers[i].R for i in (0, 3, 7)}
    plain.load_state_dict(dbp.fuse_state_dict(layers.state_dict()))
    data = images(4)
    derivatives, _ = fisher_matrix.jacobian(plain, data.x)
    ours = fisher_matrix.in_W(derivatives, Rs.get)
    layers.double()
    for n, x in enumerate(data.x.double()):
        for c in range(10):
            layers.zero_grad()
            layers(x[None])[0, c].backward()
            for name, value in ours.items():
                expected = layers.get_parameter(name).grad
                torch.testing.assert_close(value[n, c], expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("fisher")
    settings = fisher.Settings(seeds=(0, 1), steps=10, channels=(2, 3))
    return fisher.run(settings, out, progress=False), out


def test_every_matrix_is_a_line_and_in_the_report(report):
    text, out = report
    lines = (out / "fisher.csv").read_text().splitlines()
    # seeds x looks x (one form for BP, two for DBP) x kinds
    assert len(lines) == 1 + 2 * 2 * 3 * 2
    assert (out / "fisher.png").stat().st_size > 10_000
    assert (out / "report.md").read_text() == text
    assert "hours of CPU time" in text
    for form in fisher_matrix.FORMS.values():
        assert text.count(f"| 10 | {form} |") == 2


def test_both_methods_begin_alike(report):
    _, out = report
    first = [line.split(",") for line in (out / "fisher.csv").read_text().splitlines()[1:]]
    at_0 = {(line[0], line[3], line[2]): line[4:] for line in first if line[1] == "0"}
    for (seed, kind, form), values in at_0.items():
        others = [float(v) for v in at_0[seed, kind, "bp"]]
        assert [float(v) for v in values] == pytest.approx(others, rel=1e-4), form
