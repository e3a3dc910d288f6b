"""Models that know nothing of this package, and what decorrelate_model has made of them."""

import torch
from torch import nn

from dbp_kernels import nn as dnn


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


def decorrelated(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if dnn.is_decorrelated(m)]


def random_R(model: nn.Module) -> nn.Module:
    for layer in decorrelated(model):
        layer.R.add_(torch.randn_like(layer.R) * 0.2)
    return model


def names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if dnn.is_decorrelated(m)]
