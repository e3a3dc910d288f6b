"""Checkpoints of the layer form: fused without a model, or loaded into a plain one."""

import copy
import io
import warnings

import pytest
import torch
from helpers import Products
from plain_models import random_R
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import dbp_kernels as dbp
from dbp_kernels import nn as dnn


class Net(nn.Module):
    """Every kind; in some the shapes of weight and R alone leave it open what multiplies what."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 2)  # (8, 2, 2, 2), R (8, 8)
        self.up = nn.ConvTranspose2d(8, 2, 2)  # the same two shapes
        self.grouped = nn.Conv2d(2, 4, (1, 2), groups=2, bias=False)  # (4, 1, 1, 2), R (2, 2, 2)
        self.grouped_up = nn.ConvTranspose2d(4, 2, (1, 2), groups=2)  # the same again
        self.line = nn.Conv1d(2, 4, 3, groups=2)
        self.volume = nn.Conv3d(1, 2, 2)
        self.head = nn.Linear(7, 3)

    def forward(self, x):  # (N, 2, 6, 6)
        x = self.grouped_up(self.grouped(self.up(self.conv(x))))
        x = self.line(x.flatten(2))[..., :32].reshape(-1, 1, 4, 4, 8)
        return self.head(self.volume(x))


def trained(make=Net):
    torch.manual_seed(0)
    return random_R(dbp.decorrelate_model(make()))


def without_notes(state):
    return dict(state)


def saved(model):
    """As it comes back from a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Fusing.


def test_fused_as_fuse_model_does():
    model = trained()
    state = saved(model)
    before = copy.deepcopy(state)
    fused = dbp.fuse_state_dict(state)
    plain = Net()
    plain.load_state_dict(fused, strict=True)
    expected = dbp.fuse_model(copy.deepcopy(model)).state_dict()
    assert fused.keys() == expected.keys()
    for key in expected:
        assert torch.equal(fused[key], expected[key]), key
    x = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, before.values(), state.values()))
    assert before._metadata == state._metadata
    assert fused._metadata == plain.state_dict()._metadata  # a plain model's
    assert list(map(id, dbp.fuse_state_dict(fused).values())) == list(map(id, fused.values()))


@pytest.mark.parametrize("name", ["conv", "up", "grouped", "grouped_up"])
def test_what_shapes_do_not_tell_is_not_guessed(name):
    model = trained()
    layer = f"{name}."
    state = {k: v for k, v in model.state_dict().items() if k.startswith(layer)}
    with pytest.raises(ValueError, match=rf"'{name}.R'.*fits in two ways.*expected model="):
        dbp.fuse_state_dict(state)
    expected = dbp.fuse_model(copy.deepcopy(model)).state_dict()
    for told in (model, Net(), Net().to("meta")):
        fused = dbp.fuse_state_dict(state, told)
        assert torch.equal(fused[layer + "weight"], expected[layer + "weight"])
        assert layer + "R" not in fused


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(3, 3, 3, groups=3),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(6, 4, (3, 2), groups=2),
        nn.Conv1d(2, 6, 3),
        nn.Conv3d(2, 16, 2),
        nn.Linear(5, 5),
    ],
    ids=str,
)
def test_what_shapes_tell_needs_no_note(layer):
    model = random_R(dbp.decorrelate_model(nn.Sequential(layer)))
    fused = dbp.fuse_state_dict(without_notes(model.state_dict()))
    expected = dbp.fuse_model(model).state_dict()
    assert fused.keys() == expected.keys()
    assert torch.equal(fused["0.weight"], expected["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("R_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_product_is_of_float32_at_least(dtype, R_dtype):
    W, R = torch.randn(6, 40, dtype=dtype), torch.randn(40, 40, dtype=R_dtype)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with Products() as products, torch.autocast("cpu", torch.bfloat16):
            A = dbp.fuse_state_dict({"weight": W, "R": R})["weight"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert products.seen == ["ieee"]
    assert A.dtype == dtype
    exact = (W.double() @ R.double()).to(dtype)
    eps = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
    last = torch.finfo(dtype).eps  # where rounding to dtype goes the other way
    torch.testing.assert_close(A, exact, rtol=max(40 * eps, last), atol=40 * eps)


def test_an_R_of_ones_on_the_diagonal_leaves_the_weight_itself():
    state = dbp.decorrelate_model(nn.Linear(4, 3)).state_dict()
    fused = dbp.fuse_state_dict(state)
    assert fused["weight"] is state["weight"]


def test_decorrelate_modules_and_what_is_called_R_by_others_stay():
    class Other(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("R", torch.randn(4, 4))

    def make():
        return nn.Sequential(dnn.Decorrelate(4), Other(), nn.Linear(4, 2))

    model = random_R(dbp.decorrelate_model(make()))
    state = model.state_dict()
    for fused in (
        dbp.fuse_state_dict(state),
        dbp.fuse_state_dict(without_notes(state), model),
        dbp.fuse_state_dict(without_notes(state), make()),
    ):
        assert list(fused) == [key for key in state if key != "2.R"]
        assert [k for k in fused if fused[k] is not state[k]] == ["2.weight"]
    with pytest.raises(ValueError, match=r"no '0\.weight'.*expected .*model="):
        dbp.fuse_state_dict(without_notes(state))


def test_shared_layers_stay_shared_and_ties_are_told():
    def make():
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.ReLU(), shared)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = dbp.fuse_state_dict(trained(make).state_dict())
    assert fused["0.weight"] is fused["2.weight"]

    def tied():
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    model = trained(tied)
    with pytest.warns(UserWarning, match=r"'1\.weight' and '0\.weight' are one weight"):
        fused = dbp.fuse_state_dict(saved(model))
    assert torch.equal(fused["0.weight"], model[0].weight)
    torch.testing.assert_close(fused["1.weight"], model[1].weight @ model[1].R)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([1], TypeError, "mapping, got list"),
        ({"model": {"R": 1}}, TypeError, "'model': dict; expected names and tensors"),
        ({"a.weight": torch.ones(2, 3), "a.R": torch.ones(4, 4)}, ValueError, "does not fit"),
        ({"a.weight": torch.ones(2, 3), "a.R": torch.ones(3)}, ValueError, "does not fit"),
        ({"a.weight": torch.ones(2, 3).int(), "a.R": torch.eye(3)}, ValueError, "does not fit"),
        ({"a.weight_g": torch.ones(2), "a.R": torch.eye(3)}, ValueError, "weight_norm"),
    ],
)
def test_bad_state_dicts(state, error, message):
    with pytest.raises(error, match=message):
        dbp.fuse_state_dict(state)


def test_an_R_that_does_not_fit_the_noted_kind():
    state = trained().state_dict()
    state["head.R"] = torch.eye(6)
    with pytest.raises(ValueError, match=r"'head.R'\] of shape \(6, 6\) does not fit"):
        dbp.fuse_state_dict(state)
    with pytest.raises(ValueError, match="model has no layer 'other'"):
        dbp.fuse_state_dict({"other.R": torch.eye(2)}, Net())
    with pytest.raises(TypeError, match="model must be"):
        dbp.fuse_state_dict(state, [])


# Loading into a plain model.


def plain_parts(model):
    return model, dict(model.named_parameters()), [type(m) for m in model.modules()]


@pytest.mark.parametrize("notes", [True, False])
def test_a_plain_model_becomes_the_decorrelated_one(notes):
    model = trained()
    state = model.state_dict() if notes else without_notes(model.state_dict())
    other, parameters, _ = plain_parts(Net())
    assert dbp.load_decorrelated(other, state) is other
    assert all(parameters[name] is p for name, p in other.named_parameters())
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    x = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    decor = dbp.DecorUpdate(other, lr=1e-2)
    other(x)
    decor.step()
    assert len(decor.losses()) == 7


def test_layers_without_an_R_in_the_checkpoint_stay_plain():
    torch.manual_seed(0)
    model = random_R(dbp.decorrelate_model(Net(), exclude=["conv", "head"]))
    other = dbp.decorrelate_model(Net(), include=["up", "head"])
    random_R(other)
    dbp.load_decorrelated(other, model.state_dict())
    assert type(other.conv) is nn.Conv2d
    assert torch.equal(other.up.R, model.up.R)
    assert torch.equal(
        other.head.R, torch.eye(7)
    )  # decorrelated before: its R is that of a plain one
    x = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    again = model.state_dict()
    dbp.load_decorrelated(model, again)  # all of it decorrelated already


def test_a_transformer_loses_its_fast_path_and_ddp_leaves_R_alone():
    layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)  # noqa: E731
    model, other = trained(layer).eval(), layer().eval()
    dbp.load_decorrelated(other, model.state_dict())
    assert other._ddp_params_and_buffers_to_ignore == ["linear1.R", "linear2.R"]
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_shared_weight_may_be_there_once(kept):
    """As safetensors writes it."""
    model = trained(Tied)
    state = {k: v for k, v in model.state_dict().items() if k in (kept, "head.R")}
    other = dbp.load_decorrelated(Tied(), state)
    assert other.head.weight is other.embed.weight
    x = torch.arange(5)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    if kept == "embed.weight":
        with pytest.warns(UserWarning, match="one weight"):
            fused = dbp.fuse_state_dict(state, Tied())
        torch.testing.assert_close(fused["head.weight"], model.head.weight @ model.head.R)


@pytest.mark.parametrize("kept", ["0.", "2."])
def test_a_shared_layer_may_be_there_once(kept):
    def make():
        shared = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        return nn.Sequential(shared, nn.ReLU(), shared)

    model = trained(make)
    state = {k: v for k, v in model.state_dict().items() if k.startswith(kept)}
    other = dbp.load_decorrelated(make(), state)
    assert other[0] is other[2]
    assert torch.equal(other[0][0].R, model[0][0].R)
    fused = dbp.fuse_state_dict(state, make())
    assert fused.keys() == make().state_dict().keys()
    assert fused["0.0.weight"] is fused["2.0.weight"]


def without(key):
    return lambda state: state.pop(key)


def replaced(key, value):
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without("conv.weight"), RuntimeError, "Missing key.*conv.weight"),
        (without("head.bias"), RuntimeError, "Missing key.*head.bias"),
        (replaced("conv.R", torch.eye(3)), RuntimeError, "size mismatch for conv.R"),
        (replaced("head.weight", torch.ones(3, 3)), RuntimeError, "size mismatch for head.weight"),
        (replaced("new", torch.ones(3)), RuntimeError, "Unexpected key.*new"),
        (replaced("new.R", torch.eye(3)), ValueError, "'new.R', but model has no layer 'new'"),
        (replaced("R", torch.eye(3)), ValueError, "'R'.*cannot be decorrelated: Net is no kind"),
        (replaced("conv.R", 3), TypeError, "'conv.R': int"),
    ],
)
@pytest.mark.parametrize("partly", [False, True])
def test_a_bad_checkpoint_changes_nothing(spoil, error, message, partly):
    state = trained().state_dict()
    spoil(state)
    model = Net()
    if partly:
        random_R(dbp.decorrelate_model(model, include=["up", "head"]))
    before = copy.deepcopy(model.state_dict())
    _, parameters, kinds = plain_parts(model)
    attributes = [set(m.__dict__) for m in model.modules()]
    with pytest.raises(error, match=message):
        dbp.load_decorrelated(model, state)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert model.state_dict().keys() == before.keys()
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (weight_norm, "its weight is not a plain parameter"),
        (parametrizations.weight_norm, "ParametrizedLinear is no kind"),
        (lambda layer: nn.Bilinear(3, 3, 3), "Bilinear is no kind"),
        (lambda layer: nn.LazyLinear(3), "LazyLinear is no kind"),
    ],
)
def test_a_layer_that_cannot_be_decorrelated(spoil, reason):
    state = trained(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))).state_dict()
    model = nn.Sequential(nn.Linear(3, 3), spoil(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=f"'1.R', but layer '1' cannot be decorrelated: {reason}"):
        dbp.load_decorrelated(model, state)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"lazy parameter '0\.weight'"):
        dbp.load_decorrelated(nn.Sequential(nn.LazyLinear(3)), {})


def test_a_module_with_a_loading_of_its_own_is_loaded_by_it():
    """Batch norm of checkpoints from before it counted batches, keys that a hook renames."""
    make = lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))  # noqa: E731
    model = trained(make)
    state = model.state_dict()
    state["norm.weight"] = state.pop("1.weight")
    del state["1.num_batches_tracked"]
    state._metadata["1"]["version"] = 1
    other = make()

    def rename(module, state_dict, prefix, *rest):
        if "norm.weight" in state_dict:
            state_dict["1.weight"] = state_dict.pop("norm.weight")

    other.register_load_state_dict_pre_hook(rename)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dbp.load_decorrelated(other, state)
    assert torch.equal(other[0].R, model[0].R)


def test_with_transformers(tmp_path):
    """``from_pretrained`` drops R and calls it unexpected; weights and R come from its file."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        tie_word_embeddings=True,
    )
    model = trained(lambda: transformers.LlamaForCausalLM(config)).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.arange(6)[None]
    expected = model(tokens).logits
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not any(map(dnn.is_decorrelated, plain.modules()))
    state = safetensors.load_file(tmp_path / "model.safetensors")
    dbp.load_decorrelated(plain.eval(), state)
    torch.testing.assert_close(plain(tokens).logits, expected, rtol=0, atol=0)
