"""ResNet-18 on CIFAR-10 for a few epochs, by plain and by decorrelated backpropagation.

Images stay on the device as bytes, where they are cropped and mirrored; SGD with momentum and one
cycle of the learning rate; bfloat16 autocast and channels_last on a GPU. One seed fixes the network,
the order of the images and what is done to them, for both methods.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbp_kernels.backends import backend

BP, DBP, EAGER = METHODS = ("bp", "dbp", "dbp eager")  # eager: without kernels of our own
TRAIN, TEST, CLASSES, SIZE = 50_000, 10_000, 10, 32  # of CIFAR-10
BORDER = 4  # how far a crop may be off
EPOCHS = (1, 2, 3, 5, 8, 12, 16, 24)  # of which the most that fit are trained


@dataclass(frozen=True)
class Recipe:
    """What both methods share, and DBP's own numbers.

    ``model`` and ``widths`` are ``experiments.models.build_model``'s. The learning rate is the usual 0.1 for 128 images, scaled to the batch. ``decor_lr``: see
    ``DECOR_LR``.
    """

    model: str = "resnet18"
    widths: tuple[int, ...] | None = None
    batch: int = 512
    lr: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    sample: float = 0.1
    decor_lr: float = 1e-3
    kappa: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Images:
    """Bytes (N, height, width, 3) and labels (N,); those to train on have a black border."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    name: str

    def to(self, device: torch.device) -> Images:
        tensors = (self.train, self.train_labels, self.test, self.test_labels)
        return Images(*(t.to(device) for t in tensors), self.name)


def bordered(train: Tensor, *others: Tensor, name: str) -> Images:
    """Images from (N, 32, 32, 3) bytes to train on, their labels, and the same to test on."""
    return Images(F.pad(train, (0, 0, BORDER, BORDER, BORDER, BORDER)), *others, name)


def cifar10(folder: Path) -> Images:
    """From parquet files, as ``experiments.data`` finds them. Raises what it raises, on a CPU."""
    from experiments.data import find_parquet, read_parquet

    parts: list[Tensor] = []
    for split in ("train", "test"):
        found = [read_parquet(file) for file in find_parquet("cifar10", folder, split)]
        images = [image for several, _ in found for image in several]
        parts.append(torch.stack(images).permute(0, 2, 3, 1).contiguous())
        parts.append(torch.tensor([label for _, labels in found for label in labels]))
    return bordered(*parts, name="cifar10")


def synthetic(train: int = TRAIN, test: int = TEST) -> Images:
    """A coarse pattern for each class under noise: something to learn, quickly."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, SIZE, mode="bilinear").permute(0, 2, 3, 1)

    def some(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (count,), generator=generator)
        noise = torch.randn(count, SIZE, SIZE, 3, generator=generator)
        images = 128 + 30 * patterns[labels] + 60 * noise
        return images.clamp(0, 255).to(torch.uint8), labels

    return bordered(*some(train), *some(test), name="synthetic")


def load(folder: Path) -> tuple[Images, str | None]:
    """CIFAR-10 if it is there and readable, else synthetic images and the reason."""
    try:
        return cifar10(folder), None
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        return synthetic(), f"{type(error).__name__}: {error}"


def draws(images: Images, generator: torch.Generator) -> Tensor:
    """(N, 4) on the images' device, of an epoch: number of an image, its crop's place, mirrored."""
    n = len(images.train)
    places = torch.randint(2 * BORDER + 1, (2, n), generator=generator)
    mirrored = torch.randint(2, (n,), generator=generator)
    drawn = torch.stack([torch.randperm(n, generator=generator), *places, mirrored], 1)
    return drawn.to(images.train.device)  # at once: a copy in every step would wait for the device


def crops(images: Tensor, drawn: Tensor) -> Tensor:
    """Bytes (n, 32, 32, 3) from bordered images, as (n, 4) draws say."""
    number, down, right, mirrored = drawn[:, :, None].unbind(1)
    along = torch.arange(SIZE, device=images.device)
    rows = down + along
    columns = right + torch.where(mirrored == 1, SIZE - 1 - along, along)
    return images[number[:, :, None], rows[:, :, None], columns[:, None, :]]


class Training:
    """One method's network, optimiser and schedule for so many steps."""

    def __init__(self, method: str, images: Images, steps: int, recipe: Recipe) -> None:
        import dbp_kernels as dbp
        from experiments.models import build_model

        self.images, self.recipe = images, recipe
        self.device = images.train.device
        self.cuda = self.device.type == "cuda"
        self.generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.model: nn.Module = build_model(
            recipe.model, (3, SIZE, SIZE), CLASSES, widths=recipe.widths
        )
        self.model.to(self.device, memory_format=torch.channels_last)
        self.backend = "eager" if method == EAGER else "auto"
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            recipe.lr,
            recipe.momentum,
            nesterov=True,
            weight_decay=recipe.weight_decay,
        )
        self.decor = None
        if method != BP:
            self.decor = dbp.attach(
                self.model,
                self.optimizer,
                lr=recipe.decor_lr,
                kappa=recipe.kappa,
                sample=recipe.sample,
            )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, recipe.lr, steps, cycle_momentum=False
        )
        pixels = images.train[:1000, BORDER:-BORDER, BORDER:-BORDER].float()
        self.mean, self.std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))

    def logits(self, pixels: Tensor) -> Tensor:
        """(n, 10), from bytes (n, 32, 32, 3), which are channels_last once permuted."""
        x = ((pixels - self.mean) / self.std).permute(0, 3, 1, 2)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
            return self.model(x)

    def step(self, drawn: Tensor) -> Tensor:
        """Trains on the images of these draws; returns their mean loss."""
        pixels = crops(self.images.train, drawn)
        labels = self.images.train_labels[drawn[:, 0]]
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.logits(pixels), labels)
        loss.backward()
        with backend(self.backend):
            self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def batches(self) -> Iterator[Tensor]:
        """The draws of each step, epoch after epoch; what is left over in an epoch is left out."""
        while True:
            drawn = draws(self.images, self.generator).split(self.recipe.batch)
            yield from drawn[: steps_per_epoch(self.images, self.recipe)]

    def test(self) -> tuple[float, float]:
        """Mean loss and accuracy on the images to test on."""
        self.model.eval()
        loss, hits = torch.zeros(2, device=self.device)
        with torch.no_grad():
            for pixels, labels in zip(
                self.images.test.split(1000), self.images.test_labels.split(1000)
            ):
                logits = self.logits(pixels).float()
                loss += F.cross_entropy(logits, labels, reduction="sum")
                hits += (logits.argmax(1) == labels).sum()
        self.model.train()
        n = len(self.images.test)
        return loss.item() / n, hits.item() / n

    def decorrelation_loss(self) -> float | None:
        """Mean over layers at the last update; None for BP."""
        if self.decor is None:
            return None
        return torch.stack([loss.float() for loss in self.decor.losses().values()]).mean().item()

    def clock(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def steps_per_epoch(images: Images, recipe: Recipe) -> int:
    return max(1, len(images.train) // recipe.batch)


def speed(method: str, images: Images, recipe: Recipe, warmup: int, steps: int) -> float:
    """Images per second of a method's steps, after ``warmup`` others."""
    training = Training(method, images, warmup + steps, recipe)
    batches = training.batches()
    for drawn in itertools.islice(batches, warmup):
        training.step(drawn)
    begin = training.clock()
    for drawn in itertools.islice(batches, steps):
        training.step(drawn)
    return steps * min(recipe.batch, len(images.train)) / (training.clock() - begin)


def epochs_within(seconds: float, speeds: Iterable[float]) -> int:
    """The most of ``EPOCHS`` for which the slowest of so many images per second has time.

    Tests included; a forward pass is reckoned as a third of a step.
    """
    epoch = (TRAIN + TEST / 3) / min(speeds)
    return max((n for n in EPOCHS if n * epoch <= seconds), default=EPOCHS[0])


def train(method: str, images: Images, epochs: int, recipe: Recipe) -> Iterator[dict]:
    """One record an epoch. ``seconds`` are of training alone, so far."""
    speed(method, images, recipe, 2, 1)  # first calls are slower than all later ones
    count = steps_per_epoch(images, recipe)
    training = Training(method, images, epochs * count, recipe)
    batches, total = training.batches(), 0.0
    for epoch in range(1, epochs + 1):
        begin = training.clock()
        losses = [training.step(drawn) for drawn in itertools.islice(batches, count)]
        seconds = training.clock() - begin
        total += seconds
        test_loss, accuracy = training.test()
        size = min(recipe.batch, len(images.train))
        yield {
            "method": method,
            "epoch": epoch,
            "epochs": epochs,
            "train_loss": torch.stack(losses).mean().item(),
            "test_loss": test_loss,
            "test_accuracy": accuracy,
            "decorrelation_loss": training.decorrelation_loss(),
            "seconds": round(total, 3),
            "images_per_second": round(count * size / seconds, 1),
        }
