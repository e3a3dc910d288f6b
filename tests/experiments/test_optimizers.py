"""The optimisers of the experiments: Muon against torch's own, FOOF against its definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.config import RunConfig
from experiments.decorrelation import orthogonal
from experiments.foof import Foof
from experiments.muon import Muon, orthogonalised
from experiments.optimizers import Optimizers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
    )


def optimizers(model: nn.Module, **changes: Any) -> Optimizers:
    return Optimizers(
        RunConfig().override({k.replace("__", "."): v for k, v in changes.items()}), model
    )


# --- Muon -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 4), (4, 1)])
def test_orthogonalised(shape: tuple[int, int]) -> None:
    G = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    U, s, V = torch.linalg.svd(orthogonalised(G, torch.float32), full_matrices=False)
    assert s.min() > 0.6
    assert s.max() < 1.3
    theirs = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(U @ V, theirs[0] @ theirs[2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_on_matrices(adjust: str, nesterov: bool) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(*shape)) for shape in ((9, 4), (4, 9))]
    theirs = copy.deepcopy(ours)
    common: dict[str, Any] = {
        "lr": 0.05,
        "weight_decay": 0.1,
        "momentum": 0.9,
        "nesterov": nesterov,
    }
    a = Muon(ours, adjust=adjust, dtype=torch.bfloat16, **common)
    b = torch.optim.Muon(theirs, adjust_lr_fn=adjust, **common)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_muon_takes_a_convolutions_weight_as_a_matrix() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 2, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(weight.detach().flatten(1).clone())
    weight.grad = torch.randn(6, 2, 3, 3)
    matrix.grad = weight.grad.flatten(1)
    Muon([weight]).step()
    Muon([matrix]).step()
    torch.testing.assert_close(weight.flatten(1), matrix)
    with pytest.raises(ValueError, match="expected matrices"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_muon_has_the_layers_and_adamw_the_rest() -> None:
    model = network()
    muon, adamw = optimizers(model, optimizer__name="muon", optimizer__options__adamw_lr=0.003).all
    names = {id(p): name for name, p in model.named_parameters()}

    def held(optimizer: torch.optim.Optimizer) -> set[str]:
        return {names[id(p)] for group in optimizer.param_groups for p in group["params"]}

    assert held(muon) == {"0.weight", "2.weight"}
    assert held(adamw) == {"0.bias", "2.bias", "4.weight", "4.bias"}
    assert adamw.param_groups[0]["lr"] == 0.003
    muon, _ = optimizers(model, optimizer__name="muon", optimizer__options__head=["0"]).all
    assert held(muon) == {"2.weight", "4.weight"}
    with pytest.raises(ValueError, match=r"options\.head has 'fc'"):
        optimizers(model, optimizer__name="muon", optimizer__options__head=["fc"])


# --- FOOF -------------------------------------------------------------------------------------


def backward(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    model(x).square().sum().backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_foof_is_its_definition() -> None:
    model, x = network(), torch.randn(8, 2, 8, 8)
    backward(model, x)
    plain = gradients(model)
    # a rate of 0 leaves the gradients there to be looked at
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Foof(model, optimizer, damping=0.3, sample=4)
    backward(model, x)
    optimizer.step()
    Z = F.unfold(x[:4].double(), 3, padding=1)
    S = torch.einsum("bdn,ben->de", Z, Z) / (4 * 64)
    inverse = torch.linalg.inv(S + 0.3 * torch.eye(18).double())
    expected = plain["0.weight"].flatten(1).double() @ inverse
    found = gradients(model)
    torch.testing.assert_close(
        found["0.weight"].flatten(1).double(), expected, rtol=1e-4, atol=1e-6
    )
    assert torch.equal(found["0.bias"], plain["0.bias"])
    hidden = model[:2](x[:4]).detach().double()
    Z = F.unfold(hidden, 3, stride=2).reshape(4, 2, 27, 9)
    S = torch.einsum("bgdn,bgen->gde", Z, Z) / (4 * 9)
    inverse = torch.linalg.inv(S + 0.3 * torch.eye(27).double())
    expected = plain["2.weight"].double().reshape(2, 2, 27) @ inverse
    torch.testing.assert_close(
        found["2.weight"].double().reshape(2, 2, 27), expected, rtol=1e-4, atol=1e-6
    )


def test_foof_averages_and_refreshes() -> None:
    """A plain mean at first: a running one would be of the first batch's images for long."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    foof = Foof(model, optimizer, decay=0.6, every=2, sample=1.0)
    xs = torch.randn(8, 6, 5)
    seen = []
    for x in xs:
        backward(model, x)
        optimizer.step()
        seen.append(foof.S["0"][0])
    first, third, fifth = (x.T @ x / 6 for x in xs[:5:2])
    torch.testing.assert_close(seen[0], first)
    assert torch.equal(seen[1], seen[0])
    torch.testing.assert_close(seen[3], (first + third) / 2)
    torch.testing.assert_close(seen[5], 0.6 * seen[3] + 0.4 * fifth)


def test_foof_does_not_look_at_evaluations() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    foof = Foof(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.eval()
    model(torch.randn(6, 5))
    model.train()
    with torch.no_grad():
        model(torch.randn(6, 5))
    assert not foof.fresh


@pytest.mark.parametrize("transposed", [False, True])
def test_foof_on_decorrelated_inputs_steps_as_without(transposed: bool) -> None:
    """(R S R^T)^-1 in place of S^-1: whatever R is, A makes the same step, but for the damping."""
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    plain = nn.Sequential(kind(3, 4, 1, bias=False)).double()
    rotated = copy.deepcopy(plain)
    x = torch.randn(16, 3, 4, 4).double()
    for model, decorrelated in ((plain, False), (rotated, True)):
        changes: dict[str, Any] = {
            "optimizer__name": "foof",
            "optimizer__lr": 0.1,
            "optimizer__momentum": 0.0,
            "optimizer__options__damping": 1e-12,
            "optimizer__options__sample": 1.0,
        }
        if decorrelated:
            changes |= {"decor__mode": "orthogonal"}
        ours = optimizers(model, **changes)
        if decorrelated:
            _stretch(ours.all[0], (-1, 1, 1, 1) if transposed else (1, -1, 1, 1))
        backward(model, x)
        ours.step(1.0)
    torch.testing.assert_close(plain[0].weight, rotated[0].weight, rtol=1e-6, atol=1e-8)


def _stretch(optimizer: torch.optim.Optimizer, shape: tuple[int, ...]) -> None:
    """R and W such that R is not orthogonal either, and A what it was; shape: of the patch in W."""
    state = optimizer.state_dict()
    layer = state["param_groups"][0]["dbp"]["layers"]["0"]
    scale = torch.linspace(1, 2, 3, dtype=torch.float64)
    layer["R"].mul_(scale[:, None])
    layer["W"].div_(scale.view(shape))
    optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("option", "value"), [("damping", 0.0), ("decay", 1.0), ("every", 0), ("sample", 0)]
)
def test_foof_checks_its_options(option: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        Foof(model, torch.optim.SGD(model.parameters(), lr=0.1), **{option: value})  # type: ignore[arg-type]


# --- all --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__name": "lion"}, r"optimizer\.name is 'lion'"),
        ({"optimizer__options__nesterov": True}, r"optimizer\.options\.nesterov is True"),
        (
            {"optimizer__name": "foof", "optimizer__options__base": "muon"},
            r"optimizer\.options\.base is 'muon'",
        ),
        (
            {"optimizer__name": "foof", "optimizer__options__betas": [0.9, 0.9]},
            r"optimizer\.options\.betas",
        ),
    ],
)
def test_unknown_names(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizers(network(), **changes)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"nesterov": True}),
        ("adam", torch.optim.Adam, {"eps": 1e-6}),
        ("adamw", torch.optim.AdamW, {"betas": [0.8, 0.9]}),
    ],
)
def test_options_arrive(name: str, kind: type, options: dict[str, Any]) -> None:
    ours = optimizers(
        network(),
        optimizer__name=name,
        optimizer__options=options,
        optimizer__weight_decay=0.02,
        optimizer__momentum=0.7,
    )
    assert type(ours.all[0]) is kind
    group = ours.all[0].param_groups[0]
    assert group["weight_decay"] == 0.02
    assert all(torch.tensor(group[key]).equal(torch.tensor(options[key])) for key in options)
    if name == "sgd":
        assert group["momentum"] == 0.7


def test_the_factor_multiplies_every_rate() -> None:
    model = network()
    ours = optimizers(model, optimizer__name="muon")
    backward(model, torch.randn(4, 2, 8, 8))
    before = [group["lr"] for group in ours.groups()]
    ours.load_state_dict(ours.state_dict())
    ours.step(0.5)
    assert [group["lr"] for group in ours.groups()] == [lr / 2 for lr in before]


# --- controls ---------------------------------------------------------------------------------


def test_orthogonal_is() -> None:
    Q = orthogonal((2, 7, 7), torch.Generator().manual_seed(0))
    torch.testing.assert_close(Q @ Q.mT, torch.eye(7).double().expand(2, 7, 7))
    assert not torch.equal(Q[0], Q[1])


def test_an_orthogonal_R_leaves_the_network_and_stands_still() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 4, 1, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 36, 4 * 36),
    )
    x = torch.randn(4, 2, 8, 8)
    before = model(x)
    ours = optimizers(model, optimizer__name="sgd", decor__mode="orthogonal")
    assert ours.decor is not None
    torch.testing.assert_close(model(x), before)
    names = list(ours.decor.decorrelated())
    assert len(names) == 4
    R = {name: ours.decor.R(name).clone() for name in names}
    for _ in range(3):
        backward(model, x)
        ours.step(0.01)
        ours.zero_grad()
    for name in names:
        assert torch.equal(ours.decor.R(name), R[name])
        torch.testing.assert_close(
            R[name] @ R[name].mT, torch.eye(R[name].shape[-1]).expand_as(R[name])
        )
