"""experiments/models: published sizes, every image size, training under dbp.attach, a user's own."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dbp_kernels as dbp
from experiments.models import MODELS, VAE, ConvNet, build_model, negative_elbo, resnet18
from experiments.models.initialise import he_initialise

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        # torchvision.models
        ("resnet18", IMAGENET, 1000, 11_689_512),
        ("resnet34", IMAGENET, 1000, 21_797_672),
        ("resnet50", IMAGENET, 1000, 25_557_032),
        ("alexnet", IMAGENET, 1000, 61_100_840),
        ("vit_s", IMAGENET, 1000, 22_050_664),  # timm's vit_small_patch16_224
        ("resnet18", CIFAR, 10, 11_173_962),  # kuangliu/pytorch-cifar
        ("resnet9", CIFAR, 10, 6_573_120),  # Page, "How to train your ResNet"
        (
            "airbench",
            CIFAR,
            10,
            1_972_792,
        ),  # github.com/KellerJordan/cifar10-airbench: 1.97 million
    ],
)
def test_networks_have_the_published_sizes(
    name: str, shape: tuple[int, int, int], classes: int, parameters: int
) -> None:
    with torch.device("meta"):
        model = build_model(name, shape, classes)
    assert count(model) == parameters
    assert model(torch.empty(2, *shape, device="meta")).shape == (2, classes)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), CIFAR, (3, 96, 128)])
@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("alexnet", "airbench", "vae")]
)
def test_models_take_every_image_size(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = build_model(name, shape, 7)
    assert model(torch.empty(2, *shape, device="meta")).shape == (2, 7)


def test_stems_and_patches_follow_the_images_unless_they_are_named() -> None:
    with torch.device("meta"):
        assert build_model("resnet34", CIFAR, 10).conv1.kernel_size == (3, 3)
        assert build_model("resnet34", IMAGENET, 10).conv1.kernel_size == (7, 7)
        assert build_model("resnet34", CIFAR, 10, stem="imagenet").conv1.kernel_size == (7, 7)
        assert build_model("vit_s", CIFAR, 10).patches.kernel_size == (4, 4)
        assert build_model("vit_s", IMAGENET, 10).patches.kernel_size == (16, 16)
        assert build_model("vit_s", CIFAR, 10, patch=8).patches.kernel_size == (8, 8)


def test_convnet_layers_are_the_ones_asked_for() -> None:
    model = ConvNet(3, (64, 64, 128), image_size=32, batch_norm=True)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(3, 64), (64, 64), (64, 128)]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 3
    plain = ConvNet(3, (8,), batch_norm=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())


def test_resnets_have_torchvisions_names() -> None:
    names = set(resnet18().state_dict())
    assert {"conv1.weight", "layer2.0.downsample.1.running_mean", "layer4.1.bn2.bias"} <= names
    assert {"fc.weight", "fc.bias"} <= names


# Small enough for a CPU: what cannot be made small has its wide layers left alone.
TRAINED = [
    ("mlp", (1, 8, 8), {"widths": (16, 16), "batch_norm": False}),
    ("mlp", (1, 8, 8), {"widths": (16, 16)}),
    ("convnet", (3, 8, 8), {"widths": (8, 8), "batch_norm": False}),
    ("convnet", (3, 8, 8), {"widths": (8, 8)}),
    ("resnet18", (3, 16, 16), {}),
    ("resnet34", (3, 64, 64), {"stem": "imagenet"}),
    ("resnet50", (3, 16, 16), {}),
    ("alexnet", (3, 63, 63), {}),
    ("resnet9", (3, 8, 8), {"width": 8}),
    ("vit_s", (3, 8, 8), {"width": 24, "depth": 2, "heads": 3}),
    ("vae", (1, 8, 8), {"widths": (8, 16), "latent": 4}),
    ("vae", (1, 28, 28), {"widths": (4, 4), "latent": 4}),
]


@pytest.mark.parametrize(("name", "shape", "options"), TRAINED)
def test_every_network_trains_with_an_attached_optimiser(
    name: str, shape: tuple[int, int, int], options: dict
) -> None:
    torch.manual_seed(0)
    model = build_model(name, shape, 3, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = dbp.attach(model, optimizer, lr=1e-4, sample=2, max_size=600)
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    weights = {name for name, module in model.named_modules() if isinstance(module, layers)}
    large = {name for name, why in handle.left_alone().items() if "max_size" in why}
    x, y = torch.rand(4, *shape), torch.tensor([0, 1, 2, 0])
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        out = model(x)
        loss = negative_elbo(*out, x) if name == "vae" else F.cross_entropy(out, y)
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())
    losses = handle.losses()
    assert set(losses) == weights - large != set()
    assert all(loss > 0 for loss in losses.values())
    for key, value in model.named_parameters():
        assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(300, 200),
        nn.Conv2d(32, 24, 3),
        nn.Conv2d(32, 24, 3, groups=4),
        nn.ConvTranspose2d(32, 24, 4, stride=2, padding=1),
        nn.ConvTranspose2d(48, 24, 4, stride=2, groups=2),
    ],
    ids=str,
)
def test_initial_weights_keep_the_size_of_signals_through_relus(layer: nn.Module) -> None:
    torch.manual_seed(0)
    he_initialise(layer)
    shape = (2000, 300) if isinstance(layer, nn.Linear) else (20, layer.in_channels, 12, 12)
    out = layer(torch.randn(shape).relu())
    if out.dim() == 4:
        out = out[:, :, 3:-3, 3:-3]  # at the border fewer taps meet the image
    assert out.square().mean().item() == pytest.approx(1, rel=0.2)
    assert not layer.bias.any()


def test_a_vae_reconstructs_and_its_loss_is_the_bound() -> None:
    torch.manual_seed(0)
    model = VAE((1, 8, 8), widths=(8, 16), latent=4)
    images = torch.rand(6, 1, 8, 8)
    logits, mean, log_variance = model(images)
    assert logits.shape == images.shape
    assert mean.shape == log_variance.shape == (6, 4)
    assert not torch.equal(logits, model(images)[0])  # drawn anew
    model.eval()
    assert torch.equal(model(images)[0], model(images)[0])
    # By definition: Bernoulli's log likelihood, and torch's own divergence.
    normal = torch.distributions.Normal
    posterior = normal(mean, (0.5 * log_variance).exp())
    divergence = torch.distributions.kl_divergence(posterior, normal(0.0, 1.0)).sum()
    probability = logits.sigmoid()
    likelihood = images * probability.log() + (1 - images) * (1 - probability).log()
    expected = (divergence - likelihood.sum()) / 6
    torch.testing.assert_close(negative_elbo(logits, mean, log_variance, images), expected)


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("vgg", CIFAR, {}, r"model must be one of mlp, .*'vgg'"),
        ("resnet18", CIFAR, {"batch_norm": False}, r"resnet18 has no option 'batch_norm'.*False"),
        ("mlp", CIFAR, {"depth": 3}, r"mlp has no option 'depth'.*widths"),
        ("resnet18", CIFAR, {"stem": "large"}, r"stem must be .* got 'large'"),
        ("alexnet", CIFAR, {}, r"at least 63x63, got 32x32"),
        ("resnet9", (1, 4, 4), {}, r"at least 8x8, got 4x4"),
        ("airbench", (1, 8, 8), {}, r"at least 9x9, got 8x8"),
        ("vit_s", (1, 30, 30), {}, r"patch must divide images of 30x30, got 4"),
        ("vit_s", CIFAR, {"heads": 5}, r"heads must divide the width 384, got 5"),
        ("vae", (1, 30, 30), {}, r"30x30 cannot be halved 2 times.*multiples of 4"),
    ],
)
def test_build_model_names_the_bad_value(
    name: str, shape: tuple[int, int, int], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, shape, 10, **options)


def test_airbench_whitens_patches_of_the_images_that_it_is_shown() -> None:
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(200, 3, 5, 5), 9, mode="bilinear") + torch.randn(
        200, 3, 1, 1
    )
    model = build_model("airbench", (3, 9, 9), 10, widths=(4, 6, 5))
    model.initialise_from(smooth)
    whitened = model.whiten(smooth).transpose(0, 1).flatten(1)
    half = len(whitened) // 2
    torch.testing.assert_close(whitened[:half], -whitened[half:])
    second_moments = whitened[:half] @ whitened[:half].mT / whitened.shape[1]
    # of unit size but for the damping, which tells only where there is hardly anything
    torch.testing.assert_close(second_moments, torch.eye(half), atol=0.05, rtol=0)
    assert model(smooth).shape == (200, 10)
    # every convolution begins by passing on what it gets
    convolutions = [m for m in model.groups.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 6
    for convolution in convolutions:
        kept = min(convolution.weight.shape[:2])
        passed = convolution(x := torch.randn(2, convolution.in_channels, 4, 4))[:, :kept]
        torch.testing.assert_close(passed, x[:, :kept])


def test_airbench_attached_leaves_its_fixed_layer_alone() -> None:
    torch.manual_seed(0)
    model = build_model("airbench", (3, 9, 9), 10, widths=(4, 6, 5))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    handle = dbp.attach(model, optimizer, lr=1e-3, sample=4)
    before = model.whiten.weight.clone()
    F.cross_entropy(model(torch.randn(8, 3, 9, 9)), torch.arange(8)).backward()
    optimizer.step()
    assert torch.equal(before, model.whiten.weight)
    assert set(handle.left_alone()) == {"whiten"}
    assert len(handle.losses()) == 7


def test_what_a_network_has_anyway_may_be_said() -> None:
    with torch.device("meta"):
        build_model("resnet18", CIFAR, 10, batch_norm=True, pool_every=1, widths=None)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("package_of_a_user")
    monkeypatch.setitem(sys.modules, "package_of_a_user", module)
    return module


def test_a_users_own_model_gets_the_arguments_that_it_takes(own: types.ModuleType) -> None:
    seen: list[dict] = []

    def everything(**known: object) -> nn.Module:
        seen.append(known)
        return nn.Identity()

    def little(num_classes: int, depth: int = 1) -> nn.Module:
        seen.append({"num_classes": num_classes, "depth": depth})
        return nn.Identity()

    own.everything, own.little, own.nothing = everything, little, nn.Identity
    for name in ("everything", "little"):
        build_model(f"package_of_a_user:{name}", CIFAR, 10, depth=2, widths=None)
    assert seen == [
        {"image_shape": CIFAR, "num_classes": 10, "depth": 2},
        {"num_classes": 10, "depth": 2},
    ]
    with pytest.raises(ValueError, match=r"little has no option 'width' \(got 3\).*'depth'"):
        build_model("package_of_a_user:little", CIFAR, 10, width=3)
    built = build_model("experiments.models:ConvNet", CIFAR, 7)
    assert isinstance(built, ConvNet)
    assert built.classifier.out_features == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package:f", "cannot import 'no_such_package'"),
        (":f", "cannot import ''"),
        ("package_of_a_user:absent", "has no function 'absent'"),
        ("package_of_a_user:", "has no function ''"),
        ("package_of_a_user:number", "has no function 'number'"),
        ("package_of_a_user:text", r"expected a torch.nn.Module, got str"),
    ],
)
def test_a_users_own_model_that_cannot_be_had(
    own: types.ModuleType, name: str, message: str
) -> None:
    own.number, own.text = 3, lambda: "no module"
    with pytest.raises(ValueError, match=message):
        build_model(name, CIFAR, 10)
