"""decorrelate_model and fuse_model, on models that know nothing of this package."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import dbp_kernels as dbp
from dbp_kernels import nn as dnn

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*", "ignore:.*nested tensor.*")


class Block(nn.Module):
    """A ResNet block; its downsampling path is shared between two attributes."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.down = nn.Conv2d(cin, cout, 1, stride) if stride > 1 or cin != cout else nn.Identity()

    def forward(self, x):
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + self.down(x)).relu()


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
        again = Block(8, 8, 1)
        self.layers = nn.Sequential(again, Block(8, 16, 2), Block(16, 16, 1))
        self.again = again  # a shared module, used twice
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.layers(self.again(self.stem(x)))
        return self.head(x.mean((2, 3)))


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.ReLU()
        )
        self.decoder = nn.ModuleList(
            [nn.ConvTranspose2d(8, 4, 3, 2, 1, groups=2), nn.ConvTranspose2d(4, 1, 3, 2, 1)]
        )

    def forward(self, x):
        h1 = self.encoder[:2](x)
        h2 = self.encoder[2:](h1)
        y = self.decoder[0](h2, output_size=h1.shape).relu()
        return self.decoder[1](y, output_size=x.shape)


class LanguageModel(nn.Module):
    """Embedding and head share one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


class Mixed(nn.Module):
    """Every layer kind, 1d to 3d."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 4, 3, padding=1, dilation=1)
        self.b = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
        self.c = nn.Conv3d(1, 2, 2)
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.d = nn.Linear(4, 3)

    def forward(self, x):  # (N, 2, 6)
        x = self.b(self.a(x)[:, None])[:, None]
        x = self.c(x).mean(1).flatten(1)
        return self.d(self.gru(x[:, :12].reshape(-1, 4, 3))[0])


def transformer():
    return nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)


MODELS = {
    "resnet": (ResNet, lambda n: (torch.randn(n, 3, 8, 8),)),
    "autoencoder": (AutoEncoder, lambda n: (torch.randn(n, 1, 10, 9),)),
    "language model": (LanguageModel, lambda n: (torch.randint(11, (n, 6)),)),
    "mixed": (Mixed, lambda n: (torch.randn(n, 2, 6),)),
    "transformer": (transformer, lambda n: (torch.randn(n, 5, 8), torch.randn(n, 4, 8))),
}


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(" ", "-"))
def case(request):
    torch.manual_seed(0)
    make, data = MODELS[request.param]
    return make(), data


def decorrelated(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if dnn.is_decorrelated(m)]


def random_R(model: nn.Module) -> None:
    for layer in decorrelated(model):
        layer.R.add_(torch.randn_like(layer.R) * 0.2)


def test_outputs_and_parameters_stay(case):
    model, data = case
    plain = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        x = data(4)
        before = plain(*x)
        assert dbp.decorrelate_model(model) is model
        torch.testing.assert_close(model(*x), before)
        with torch.no_grad():
            torch.testing.assert_close(model(*x), plain(*x))
    assert len(decorrelated(model)) > 0
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in parameters)
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    model.load_state_dict(plain.state_dict())  # a plain checkpoint


def test_train_then_fuse(case):
    model, data = case
    plain = copy.deepcopy(model)
    dbp.decorrelate_model(model)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    decor = dbp.DecorUpdate(model, lr=1e-2, sample=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(*data(4)).square().mean().backward()
        optimiser.step()
        decor.step()
    # Layers that attention reads behind their backs are not touched, so all of these learn.
    assert len(decor.losses()) == len(decorrelated(model))
    eye_distance = [(m.R - torch.eye(m.R.shape[-1])).abs().max() for m in decorrelated(model)]
    assert min(eye_distance) > 0
    model.eval()
    x = data(4)
    with torch.no_grad():
        expected = model(*x)
        fused = dbp.fuse_model(copy.deepcopy(model))
        assert decorrelated(fused) == []
        assert decorrelated(model) != []
        torch.testing.assert_close(fused(*x), expected, rtol=1e-4, atol=1e-5)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(fused.state_dict())
    if not isinstance(model, LanguageModel):  # the plain one ties two weights that now differ
        torch.testing.assert_close(plain.eval()(*x), expected, rtol=1e-4, atol=1e-5)
    pickle.loads(pickle.dumps(fused))(*x)


def test_round_trip_without_training_changes_nothing(case):
    model, _ = case
    parameters, attributes = list(model.parameters()), [set(m.__dict__) for m in model.modules()]
    dbp.fuse_model(dbp.decorrelate_model(model))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [set(m.__dict__) for m in model.modules()] == attributes


def test_shared_modules_are_followed_once():
    model = dbp.decorrelate_model(ResNet())
    assert model.again is model.layers[0]
    assert type(model.again.conv1) is dnn.DecorConv2d
    decor = dbp.DecorUpdate(model, sample=1.0)
    model(torch.randn(2, 3, 8, 8))
    recorder = {n: r for (n, _), r in zip(decor._named_layers(), decor._recorders[0])}
    assert len(recorder["layers.0.conv1"].samples) == 2
    assert len(recorder["layers.1.conv1"].samples) == 1


def test_hooks_attributes_and_outside_references_survive():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    seen = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(type(m)))
    model[0].register_forward_pre_hook(lambda m, i: seen.append("pre"))
    model[0].note = "kept"
    model[1].eval().requires_grad_(False)
    first = model[0]
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    dbp.decorrelate_model(model)
    assert first is model[0]
    assert type(first) is dnn.DecorLinear
    assert first.note == "kept"
    model(torch.randn(2, 3))
    assert seen == ["pre", dnn.DecorLinear]
    assert not model[1].training
    assert not model[1].weight.requires_grad
    assert optimiser.param_groups[0]["params"][0] is model[0].weight
    random_R(model)
    assert not dbp.fuse_model(model)[1].weight.requires_grad


def test_dtype_and_device():
    model = dbp.decorrelate_model(nn.Sequential(nn.Linear(3, 3).half(), nn.Linear(3, 3).double()))
    assert [m.R.dtype for m in model] == [torch.float32, torch.float64]
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    assert dbp.decorrelate_model(model).R.is_meta
    assert dbp.fuse_model(model).weight.is_meta


def test_a_root_that_is_a_layer():
    layer = nn.Conv2d(2, 3, 3)
    assert type(dbp.decorrelate_model(layer)) is dnn.DecorConv2d
    assert type(dbp.fuse_model(layer)) is nn.Conv2d


def test_idempotent():
    model = dbp.decorrelate_model(ResNet())
    random_R(model)
    state = copy.deepcopy(model.state_dict())
    dbp.decorrelate_model(model)
    for a, b in zip(state.values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


class MyLinear(nn.Linear):
    pass


def test_only_exact_types_with_plain_weights():
    pruned = nn.Linear(3, 3)
    prune.l1_unstructured(pruned, "weight", 2)
    layers = {
        "subclass": MyLinear(3, 3),
        "parametrized": parametrizations.weight_norm(nn.Linear(3, 3)),
        "old weight norm": weight_norm(nn.Linear(3, 3)),
        "pruned": pruned,
        "lazy": nn.LazyLinear(3),
        "attention": nn.MultiheadAttention(4, 2),
        "bilinear": nn.Bilinear(3, 3, 3),
        "embedding": nn.Embedding(3, 3),
        "transposed 1d": nn.ConvTranspose1d(3, 3, 3),
        "complex": nn.Linear(3, 3, dtype=torch.complex64),
    }
    model = nn.ModuleDict(layers)
    before = [type(m) for m in model.modules()]
    dbp.decorrelate_model(model)
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(ValueError, match="no decorrelated layer"):
        dbp.DecorUpdate(model)


def names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if dnn.is_decorrelated(m)]


ALL = [
    "stem",
    *[f"layers.{i}.{c}" for i in range(3) for c in ("conv1", "conv2", *["down"] * (i == 1))],
    "head",
]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ALL),
        ("stem", None, ["stem"]),
        (["stem", "head"], "head", ["stem"]),
        ("*.conv1", None, [f"layers.{i}.conv1" for i in range(3)]),
        ("layers.1", None, ["layers.1.conv1", "layers.1.conv2", "layers.1.down"]),
        ("again", None, ["layers.0.conv1", "layers.0.conv2"]),
        (nn.Linear, None, ["head"]),
        (None, nn.Conv2d, ["head"]),
        (None, ("layers", "stem"), ["head"]),
        (
            lambda name, m: m.weight.shape[0] == 16,
            ["head"],
            [n for n in ALL if "s.1" in n or "s.2" in n],
        ),
        ((), None, []),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    model = dbp.decorrelate_model(ResNet(), include=include, exclude=exclude)
    assert names(model) == expected


def test_modules_as_filters():
    model = ResNet()
    assert names(dbp.decorrelate_model(model, include=model.layers, exclude=model.again)) == [
        n for n in ALL if "s.1" in n or "s.2" in n
    ]


def test_bad_arguments_change_nothing():
    model = ResNet()
    with pytest.raises(ValueError, match=r"include='layer1\*' matches no module"):
        dbp.decorrelate_model(model, include=["stem", "layer1*"])
    with pytest.raises(ValueError, match="exclude='heads'"):
        dbp.decorrelate_model(model, exclude="heads")
    with pytest.raises(TypeError, match="include=3"):
        dbp.decorrelate_model(model, include=3)
    with pytest.raises(TypeError, match="exclude=None"):
        dbp.decorrelate_model(model, exclude=[None])
    model.head.R = 3
    with pytest.raises(ValueError, match="'head' has an attribute R"):
        dbp.decorrelate_model(model)
    for function in (dbp.decorrelate_model, dbp.fuse_model):
        with pytest.raises(TypeError, match="got list"):
            function([model])
    assert names(model) == []


# Code that reads weights behind the layer's back.


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_honours_R_in_evaluation(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x = torch.randn(3, 5, 8)
    model.eval()
    with torch.no_grad():
        plain = model(x)
        dbp.decorrelate_model(model)
        assert names(model) == [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
        torch.testing.assert_close(model(x), plain)
        random_R(model)
        fast = model(x)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, 3:] = True
        fast_padded = model(x, src_key_padding_mask=padding)
    slow = model(x.requires_grad_())  # with gradients there is no fast path
    torch.testing.assert_close(fast, slow)
    assert not torch.allclose(fast, plain)
    slow_padded = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast_padded[~padding], slow_padded[~padding])
    # The fast path is back after fusing, in a copy too.
    fused = dbp.fuse_model(copy.deepcopy(model))
    assert fused.layers[0].activation_relu_or_gelu == 1
    assert fused.use_nested_tensor == (not norm_first)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), fast, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            fused(x, src_key_padding_mask=padding)[~padding],
            fast_padded[~padding],
            rtol=1e-4,
            atol=1e-5,
        )


def test_transformer_without_decorrelated_linears_keeps_its_fast_path():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    dbp.decorrelate_model(model, exclude="0")
    assert model[0].activation_relu_or_gelu == 1
    assert names(model) == ["1"]


def test_transformer_built_by_hand_honours_R_once_an_optimiser_is_made():
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model.linear1 = dnn.DecorLinear(8, 16)
    dbp.DecorUpdate(model)
    random_R(model)
    x = torch.randn(3, 5, 8)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


def test_attention_projection_is_left_alone():
    model = dbp.decorrelate_model(transformer())
    assert not any("attn" in name for name in names(model))


# Fusing.


def test_tied_weights_keep_their_values_and_lose_the_tie():
    model = dbp.decorrelate_model(LanguageModel())
    embedding, head = model.embed.weight, model.head.weight
    assert embedding is head
    random_R(model)
    before = embedding.detach().clone()
    expected = before @ model.head.R
    dbp.fuse_model(model)
    assert torch.equal(model.embed.weight, before)
    assert model.head.weight is not model.embed.weight
    torch.testing.assert_close(model.head.weight, expected)


def test_layers_that_share_a_parameter_fuse_each_with_its_own_R():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    dbp.decorrelate_model(model)
    assert model[1].weight is model[0].weight
    random_R(model)
    x = torch.randn(3, 4)
    expected = model(x)
    torch.testing.assert_close(dbp.fuse_model(model)(x), expected)


def test_fuse_keeps_marks_on_parameters():
    model = dbp.decorrelate_model(nn.Linear(3, 3))
    model.weight.no_decay = True
    random_R(model)
    assert dbp.fuse_model(model).weight.no_decay


def test_fuse_refuses_what_it_cannot_do_and_changes_nothing():
    class Special(dnn.DecorLinear):
        pass

    for spoil in (
        lambda m: Special(3, 3),
        lambda m: parametrizations.weight_norm(m),
        weight_norm,
        lambda m: prune.l1_unstructured(m, "weight", 2) and m,
    ):
        model = dbp.decorrelate_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
        model[1] = spoil(model[1])
        random_R(model)
        weight = model[0].weight
        with pytest.raises(ValueError, match="cannot fuse layer '1'"):
            dbp.fuse_model(model)
        assert type(model[0]) is dnn.DecorLinear
        assert model[0].weight is weight
        model(torch.randn(2, 3)).sum().backward()  # reparametrised layers work as they are


def test_fuse_ends_the_optimiser():
    model = dbp.decorrelate_model(nn.Sequential(nn.Linear(3, 3)))
    decor = dbp.DecorUpdate(model)
    model(torch.randn(2, 3))
    dbp.fuse_model(model)
    assert not decor._recorders[0][0].samples
    with pytest.raises(RuntimeError, match="fused"):
        decor.step()


def test_decorrelate_module_stays():
    model = nn.Sequential(dnn.Decorrelate(4), nn.Linear(4, 2))
    dbp.decorrelate_model(model)
    random_R(model)
    x = torch.randn(3, 4)
    expected = model(x)
    dbp.fuse_model(model)
    torch.testing.assert_close(model(x), expected)
    assert type(model[0]) is dnn.Decorrelate
    assert type(model[1]) is nn.Linear


def test_compiled_before_surgery():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 3)
    torch.testing.assert_close(compiled(x), model(x))
    dbp.decorrelate_model(model)
    random_R(model)
    torch.testing.assert_close(compiled(x), model(x))
    assert names(dbp.decorrelate_model(compiled, include="0")._orig_mod) == ["0"]
    decor = dbp.DecorUpdate(compiled)
    compiled(x)
    assert len(decor._recorders[0][0].samples) == 1
    dbp.fuse_model(model)
    torch.testing.assert_close(compiled(x), model(x))


def test_the_list_of_buffers_ddp_leaves_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model._ddp_params_and_buffers_to_ignore = ["1.running_mean"]
    dbp.decorrelate_model(model)
    assert set(model._ddp_params_and_buffers_to_ignore) == {"0.R", "1.running_mean"}
    dbp.fuse_model(model)
    assert model._ddp_params_and_buffers_to_ignore == ["1.running_mean"]
    assert not hasattr(dbp.fuse_model(ResNet()), "_ddp_params_and_buffers_to_ignore")
    built_by_hand = nn.Sequential(dnn.DecorLinear(3, 3))
    dbp.DecorUpdate(nn.Sequential(built_by_hand))
    dbp.DecorUpdate(built_by_hand)
    assert built_by_hand._ddp_params_and_buffers_to_ignore == ["0.R"]


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    """Adapters and offloading hooks replace it on the instance, and would go on without R."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    plain_forward = model[0].forward
    model[0].forward = lambda x: plain_forward(x) * 2
    dbp.decorrelate_model(model)
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is dnn.DecorLinear
    forward = model[1].forward
    model[1].forward = lambda x: forward(x) * 2
    with pytest.raises(ValueError, match=r"'1'.*forward"):
        dbp.fuse_model(model)
    assert type(model[1]) is dnn.DecorLinear
    del model[1].forward
    dbp.fuse_model(model)
    assert type(model[1]) is nn.Linear


# What was done, and what was not.


def test_the_report_says_what_was_swapped_and_what_was_not_and_why(capsys):
    pruned = nn.Linear(3, 3)
    prune.l1_unstructured(pruned, "weight", 2)
    replaced = nn.Linear(3, 3)
    replaced.forward = lambda x: x
    model = nn.Sequential()
    for name, module in {
        "conv": nn.Conv2d(4, 8, 3, groups=2),
        "norm": nn.BatchNorm2d(3),
        "embedding": nn.Embedding(3, 3),
        "outside": nn.Linear(3, 3),
        "excluded": nn.Linear(3, 3),
        "pruned": pruned,
        "replaced": replaced,
        "lazy": nn.LazyLinear(3),
        "complex": nn.Linear(3, 3, dtype=torch.complex64),
        "before": dnn.DecorLinear(3, 3),
        "head": nn.Linear(512, 3),
    }.items():
        model.add_module(name, module)
    included = lambda name, _: name != "outside"  # noqa: E731
    assert dbp.decorrelate_model(model, included, "excluded", report=True) is model
    assert capsys.readouterr().out.splitlines() == [
        "decorrelated  R             MiB",
        "conv          2 x 18 x 18  0.00",
        "head          512 x 512    1.00",
        "total                      1.00",
        "left alone",
        "embedding  Embedding is no kind that dbp.nn has decorrelated",
        "outside    not among include",
        "excluded   among exclude",
        "pruned     its weight is not a plain parameter",
        "replaced   its forward has been replaced on the instance, and may not use the weight",
        "lazy       LazyLinear is no kind that dbp.nn has decorrelated",
        "complex    its weight is torch.complex64",
        "before     decorrelated already",
    ]
    dbp.decorrelate_model(nn.Linear(3, 3), report=True)
    assert "the model     3 x 3" in capsys.readouterr().out
    dbp.decorrelate_model(ResNet())
    assert capsys.readouterr().out == ""
