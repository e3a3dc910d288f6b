"""Whatever an argument is: the call works, or names what is wrong and has changed nothing."""

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mutations import TENSORS, VALUES, canonical
from torch import nn

import dbp_kernels as dbp
from dbp_kernels.optim import kinds

pytestmark = pytest.mark.filterwarnings("ignore")

x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
WINDOW = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1}
CONVOLUTION = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "patch_gram": {"input": x, **WINDOW, "padding_mode": "zeros"},
    "patch_mean": {"input": x, **WINDOW, "padding_mode": "zeros"},
    "decorrelate": {"input": x, "R": torch.eye(36), **WINDOW, "padding_mode": "zeros"},
    "decor_stats": {"input": x, "R": torch.eye(36), **WINDOW, "padding_mode": "zeros"},
    "decor_update": {
        **{"input": x, "R": torch.eye(36), **WINDOW, "padding_mode": "zeros"},
        **{"lr": 0.1, "kappa": 0.5, "rule": "standard", "demean": False},
    },
    "decor_conv1d": {
        **{"input": x[:, :, 0], "weight": torch.ones(3, 4, 3), "R": torch.eye(12)},
        **{"bias": torch.ones(3), **CONVOLUTION},
    },
    "decor_conv2d": {
        **{"input": x, "weight": torch.ones(3, 4, 3, 3), "R": torch.eye(36)},
        **{"bias": torch.ones(3), **CONVOLUTION},
    },
    "decor_conv3d": {
        **{"input": x[None], "weight": torch.ones(3, 2, 1, 3, 3), "R": torch.eye(18)},
        **{"bias": torch.ones(3), **CONVOLUTION},
    },
    "decor_conv_transpose2d": {
        **{"input": x, "weight": torch.ones(4, 3, 3, 3), "R": torch.eye(4)},
        **{"bias": torch.ones(3), "stride": 1, "padding": 1, "output_padding": 0},
        **{"groups": 1, "dilation": 1},
    },
    "decor_linear": {
        **{"input": x, "weight": torch.ones(3, 5), "R": torch.eye(5), "bias": torch.ones(3)},
    },
    "condensed_weight": {"weight": torch.ones(3, 5), "R": torch.eye(5), "groups": 1},
    "condensed_weight_transposed": {"weight": torch.ones(4, 3), "R": torch.eye(4), "groups": 1},
    "pad_input": {
        **{"input": x, "kernel_size": (3, 3), "stride": 1, "padding": 1, "dilation": 1},
        **{"padding_mode": "zeros"},
    },
}
MORE: list[Any] = [
    *TENSORS,
    *(torch.ones(2, 4, 5, 5, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.half)),
    *(torch.eye(size) for size in (4, 5, 12, 18, 35, 36)),
    *(torch.eye(size, device="meta") for size in (4, 5, 12, 18, 36)),
    *(torch.eye(36).to_sparse(), torch.ones(3, 4, 3, 3), torch.full((36, 36), torch.nan)),
    *((1, 1), [2, 2], (3, 3, 3), (0, 0), [1.0, 1.0], [None], "same", "valid", "circular"),
]
ALIASES = {"model": ("module",), "modules": ("model",), "input": ("forward",)}


def names(error: Exception, arguments: Any) -> bool:
    """Whether it names one of the arguments: what does not fit together may be either's fault."""
    told = str(error)
    known = [word for name in arguments for word in (name, *ALIASES.get(name, ()))]
    return any(re.search(rf"\b{word}\b", told) for word in known) or any(
        len(word) > 3 and word.replace("_", " ") in told.lower().replace("_", " ") for word in known
    )


def as_torch(name: str, arguments: dict[str, Any], error: Exception) -> bool:
    """Whether the plain function refuses the same: what it is to say of input and bias, it says."""
    plain = getattr(F, name.removeprefix("decor_"), None)
    if plain is None or str(arguments.get("padding_mode", "zeros")) != "zeros":
        return False
    try:
        plain(**{k: v for k, v in arguments.items() if k not in ("R", "padding_mode")})
    except type(error):
        return True
    except Exception:
        return False
    return False


def hostile(rng: random.Random, of: Any) -> Any:
    """A value for an argument that is ``of`` in a valid call."""
    if isinstance(of, torch.Tensor):
        return rng.choice([*MORE, *VALUES[:20], of.double(), of[..., :-1], of[None]])
    if rng.random() < 0.2:
        return rng.choice([v for v in MORE if isinstance(v, torch.Tensor) and not v.is_sparse])
    # of a sparse tensor torch's dispatcher says that it is no number, but not which argument
    return rng.choice([v for v in [*VALUES, *MORE] if not getattr(v, "is_sparse", False)])


def attempt(campaign, name: str, call: Callable[..., Any], valid: dict[str, Any]) -> None:
    """Calls with hostile values: right, or refused by name, and the valid ones are as before."""
    call(**valid)
    before = canonical(valid)
    for rng in campaign.cases(150):
        arguments = dict(valid)
        for key in rng.sample(sorted(valid), min(len(valid), rng.choice((1, 1, 1, 2)))):
            arguments[key] = hostile(rng, valid[key])
        if too_large(arguments):
            continue
        try:
            call(**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            told = names(error, valid) or as_torch(name, arguments, error)
            assert told, (arguments, error)  # noqa: PT017
        assert canonical(valid) == before


@pytest.mark.kind("arguments")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(campaign, name):
    attempt(campaign, name, getattr(dbp, name), FUNCTIONS[name])


@pytest.mark.kind("arguments")
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if hasattr(torch.ops.dbp, name)])
def test_operators(campaign, name):
    """The same of torch.ops.dbp, which take lists of ints."""
    valid = {k: v for k, v in FUNCTIONS[name].items() if k != "padding_mode"}
    dims = {"decor_conv1d": 1, "decor_conv3d": 3}.get(name, 2)
    for key in {"kernel_size", "stride", "padding", "dilation", "output_padding"} & valid.keys():
        valid[key] = [valid[key]] * dims
    attempt(campaign, name, getattr(torch.ops.dbp, name), valid)


def too_large(arguments: dict[str, Any]) -> bool:
    """Sizes that would take all memory, which plain convolutions try to have as well."""
    sizes = [v for k in WINDOW for v in as_list(arguments.get(k)) if isinstance(v, int)]
    return any(abs(size) > 2**10 for size in sizes)


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ------------------------------------------------------------------------ models and optimisers


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(27, 2))


def decorrelated() -> nn.Module:
    return dbp.decorrelate_model(plain())


def everything(*objects: Any) -> Any:
    """All that a refused call might have changed: values, hooks, attributes, classes."""
    told: list[Any] = []
    for thing in objects:
        if isinstance(thing, nn.Module):
            told.append(canonical(thing.state_dict()))
            for module in thing.modules():
                hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
                told.append((type(module), sorted(vars(module)), hooks))
        else:
            hooks = [len(v) for k, v in vars(thing).items() if k.endswith("_hooks")]
            told += [canonical(thing.state_dict()), sorted(vars(thing)), hooks]
    return told


RULE = {"lr": 0.1, "kappa": 0.5, "sample": 0.5, "rule": "standard", "update_every": 1}
LEARNING = {
    **{**RULE, "demean": False, "sampling": "first", "budget": None, "costs": "planned"},
    **{"matmul_precision": None, "stagger": False, "clip": 0.5, "cuda_graph": False},
}


@pytest.mark.kind("arguments")
def test_decor_update(campaign):
    for rng in campaign.cases(300):
        net = decorrelated()
        before = everything(net)
        valid = {"model": net, **LEARNING}
        if one_call(dbp.DecorUpdate, valid, rng) is None:
            assert everything(net) == before


@pytest.mark.kind("arguments")
def test_groups(campaign):
    """Options of a parameter group, and those that are set by hand, which step() checks."""
    for rng in campaign.cases(300):
        net = decorrelated()
        decor = dbp.DecorUpdate([net[0]])

        def add(decor: dbp.DecorUpdate = decor, **group: Any) -> None:
            decor.add_param_group(group)

        before = everything(net, decor)
        valid = {"modules": [net[2]], **RULE, "demean": False, "sampling": "first", "clip": 0.5}
        if one_call(add, valid, rng) is None:
            assert everything(net, decor) == before
        net(x).sum().backward()
        decor.step()


@pytest.mark.kind("arguments")
def test_attach(campaign):
    for rng in campaign.cases(300):
        net = plain()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        before = everything(net, optimizer)
        more = {"include": None, "exclude": None, "groups": None, "max_size": None}
        valid = {"model": net, "optimizer": optimizer, **LEARNING, **more}
        decor = one_call(dbp.attach, valid, rng)
        if decor is None:
            assert everything(net, optimizer) == before
            continue
        net(x).square().mean().backward()
        optimizer.step()
        decor.detach()


@pytest.mark.kind("arguments")
def test_surgery(campaign):
    """Swapping layers in and out, checkpoints, and what the planner does."""
    calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (dbp.decorrelate_model, {"include": None, "exclude": None, "report": False}),
        (dbp.fuse_model, {}),
        (dbp.load_decorrelated, {"state_dict": decorrelated().state_dict()}),
        (dbp.fuse_state_dict, {"state_dict": decorrelated().state_dict()}),
        (dbp.explain, {"input": x, "sample": 0.5, "update_every": 1}),
    ]
    for rng in campaign.cases(300):
        call, more = rng.choice(calls)
        net = decorrelated() if call is dbp.fuse_model else plain()
        before = everything(net)
        if one_call(call, {"model": net, **copy.deepcopy(more)}, rng) is None:
            assert everything(net) == before


@pytest.mark.kind("arguments")
def test_the_rest(campaign, monkeypatch):
    """Names of backends and kinds of layers."""
    monkeypatch.setattr(kinds, "_kinds", dict(kinds._kinds))  # others are to find their own

    def backend(name: Any) -> bool:
        with dbp.backend(name):
            return True

    calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (backend, {"name": "eager"}),
        (dbp.register, {"kind": type("Own", (nn.Linear,), {}), "describe": lambda _: "no"}),
        (dbp.nn.Decorrelate, {"num_features": 3}),
    ]
    for rng in campaign.cases(200):
        call, valid = rng.choice(calls)
        one_call(call, valid, rng)


def one_call(call: Callable[..., Any], valid: dict[str, Any], rng: random.Random) -> Any:
    """With a hostile value or two: its result, or None where it was refused by name."""
    arguments = dict(valid)
    for key in rng.sample(sorted(valid), min(len(valid), rng.choice((1, 1, 1, 2)))):
        arguments[key] = rng.choice([*VALUES, *MORE, "*", "0", nn.Linear, nn.ReLU(), lambda *_: 1])
    try:
        result = call(**arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        assert names(error, valid), (arguments, error)  # noqa: PT017
        return None
    return True if result is None else result
