"""One training in two forms, in float64: decorrelated layers, and ``dbp.attach`` beside an optimiser."""

import torch
import torch.nn.functional as F
from torch import nn

import dbp_kernels as dbp

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adam, one by one": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


# lr of R above the default: what is compared must have moved
OPTIONS = {"lr": 1e-2, "sample": 0.5}


class Net(nn.Module):
    """A network with every kind of layer that the layer form has, ending in (N, T, D) -> classes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.tokens = nn.Linear(6, 12)
        self.line = nn.Conv1d(12, 7, 3)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.grouped(x)) + self.depthwise(x)
        x = F.relu(self.norm(self.up(x)))
        x = torch.tanh(self.tokens(x.flatten(2).transpose(1, 2)))
        x = F.relu(self.line(x.transpose(1, 2))).mean(2)
        return self.head(x)


def batches(steps, micro=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps * micro):
        x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield 1 + x + x.roll(1, 3), torch.randint(5, (6,), generator=generator)


def make():
    torch.manual_seed(0)
    return Net().double()


class LayerForm:
    """The same training with decorrelated layers."""

    def __init__(self, make_optimizer, **options):
        self.model = dbp.decorrelate_model(make())
        self.optimizer = make_optimizer(self.model.parameters())
        torch.manual_seed(1)  # from which the order of random samples comes
        self.decor = dbp.DecorUpdate(self.model, **options)

    def step(self):
        self.optimizer.step()
        self.decor.step()
        self.optimizer.zero_grad()

    def of(self, name):
        layer = self.model.get_submodule(name)
        return layer._condense(), layer.weight, layer.R


class OptimizerForm:
    def __init__(self, make_optimizer, **options):
        self.model = make()
        self.optimizer = make_optimizer(self.model.parameters())
        torch.manual_seed(1)
        self.decor = dbp.attach(self.model, self.optimizer, **options)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def of(self, name):
        return self.model.get_submodule(name).weight, self.decor.W(name), self.decor.R(name)


def train(form, steps, micro=1, seed=0):
    losses = []
    for n, (x, y) in enumerate(batches(steps, micro, seed), 1):
        loss = F.cross_entropy(form.model(x), y)
        loss.backward()
        losses.append(loss.detach())
        if n % micro == 0:
            form.step()
    return torch.stack(losses)


LAYERS = ("first", "grouped", "depthwise", "up", "tokens", "line", "head")


def assert_equal(layers, attached, tolerance=1e-12):
    for name in LAYERS:
        for ours, theirs in zip(attached.of(name), layers.of(name)):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)
    for ours, theirs in zip(
        attached.optimizer.state_dict()["state"].values(),
        layers.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=tolerance, atol=tolerance)


def trained(steps=3, optimizer="adamw", **options):
    form = OptimizerForm(OPTIMIZERS[optimizer], **{**OPTIONS, **options})
    train(form, steps)
    return form


def A_of(form, name):
    site = form.decor._site(name)
    return site.condensed()


def closure_of(form, x, y):
    def evaluate():
        form.optimizer.zero_grad()
        if isinstance(form, LayerForm):  # where samples do not go with their gradient
            form.decor.discard()
        loss = F.cross_entropy(form.model(x), y)
        loss.backward()
        return loss

    return evaluate


def pending(form):
    return sum(len(r.samples) for recorders in form.decor._engine._recorders for r in recorders)
