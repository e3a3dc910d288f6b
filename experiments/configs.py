"""What a comparison consists of: one dataclass, and the presets that fill it in beforehand."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

METHODS = ("bp", "dbp")


@dataclass(frozen=True)
class Setting:
    """One point of a method's learning-rate grid. ``decor_lr`` is ``None`` for plain BP."""

    method: str
    lr: float
    decor_lr: float | None = None

    def label(self) -> str:
        if self.decor_lr is None:
            return f"{self.method} lr {self.lr:g}"
        return f"{self.method} lr {self.lr:g} decor {self.decor_lr:g}"


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a comparison, apart from the machine.

    Attributes:
        methods: any of "bp", "dbp".
        model: "mlp", "convnet" or "resnet18".
        data: "digits", "mnist" or "cifar10".
        seeds: each seed fixes the initial weights and the order of the batches, for both methods.
        epochs: passes over the training images in each run.
        lr_bp, lr_dbp: learning rates (Adam) that each method tries.
        decor_lr: learning rates eps of R that DBP tries, each with each ``lr_dbp``.
        kappa: 0 decorrelates only, 1 normalises variance only.
        sample: fraction (float) or number (int) of each batch's images that the statistics see.
        update_every: steps between two updates of R.
        rule: "standard" or "normalized".
        demean: subtract the mean from the statistics.
        batch_size: images per step.
        batch_norm: whether mlp and convnet have it.
        widths: channels of the convnet or hidden widths of the mlp; ``None``: the default.
        pool_every: a max-pool after every so many convolutions of the convnet.
        train_size, test_size: take only the first so many images; ``None``: all.
        validation_fraction: share of the training images kept for choosing learning rates.
        data_dir: folder of the parquet files (not used by digits).
        device: "cpu" or "cuda".
        threads: CPU threads; ``None``: torch's default.
        amp: ``None`` or "bf16" (autocast).
        channels_last: memory format of images and weights.
    """

    methods: tuple[str, ...] = METHODS
    model: str = "convnet"
    data: str = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10
    lr_bp: tuple[float, ...] = (1e-3,)
    lr_dbp: tuple[float, ...] = (1e-3,)
    decor_lr: tuple[float, ...] = (1e-3,)
    kappa: float = 0.5
    sample: float | int = 0.1
    update_every: int = 1
    rule: str = "standard"
    demean: bool = False
    batch_size: int = 64
    batch_norm: bool = True
    widths: tuple[int, ...] | None = None
    pool_every: int = 1
    train_size: int | None = None
    test_size: int | None = None
    validation_fraction: float = 0.1
    data_dir: str = "data"
    device: str = "cpu"
    threads: int | None = None
    amp: str | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        def demand(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        demand(bool(self.methods), "methods", "at least one of bp, dbp")
        demand(set(self.methods) <= set(METHODS), "methods", "among bp, dbp")
        demand(bool(self.seeds), "seeds", "at least one seed")
        demand(self.epochs >= 1, "epochs", "at least 1")
        demand(self.batch_size >= 1, "batch_size", "at least 1")
        demand(self.update_every >= 1, "update_every", "at least 1")
        demand(self.pool_every >= 1, "pool_every", "at least 1")
        demand(0 <= self.kappa <= 1, "kappa", "between 0 and 1")
        demand(self.rule in ("standard", "normalized"), "rule", "'standard' or 'normalized'")
        demand(self.amp in (None, "bf16"), "amp", "'bf16' or left out")
        demand(0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1")
        if isinstance(self.sample, float):
            demand(0 < self.sample <= 1, "sample", "a fraction in (0, 1] or a count")
        else:
            demand(self.sample >= 1, "sample", "a fraction in (0, 1] or a count")
        for name in ("lr_bp", "lr_dbp", "decor_lr"):
            values = getattr(self, name)
            demand(bool(values) and min(values) > 0, name, "positive learning rates")
        for name in ("train_size", "test_size"):
            value = getattr(self, name)
            demand(value is None or value >= 1, name, "at least 1")

    def settings(self) -> list[Setting]:
        """The grid, with the methods taking turns so that machine drift hits both alike."""
        by_method = {
            "bp": [Setting("bp", lr) for lr in self.lr_bp],
            "dbp": [Setting("dbp", lr, eps) for eps in self.decor_lr for lr in self.lr_dbp],
        }
        columns = [by_method[method] for method in dict.fromkeys(self.methods)]
        longest = max(len(column) for column in columns)
        return [column[i] for i in range(longest) for column in columns if i < len(column)]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of ``dataclasses.asdict`` through JSON (lists become tuples)."""
        names = {field.name for field in fields(cls)}
        return cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        )


# Parts of a configuration that may grow when a comparison is resumed; all others must agree.
GRID_FIELDS = ("methods", "seeds", "lr_bp", "lr_dbp", "decor_lr")

PRESETS: dict[str, dict[str, Any]] = {
    # Four learning settings for each method, fixed beforehand.
    "demo": {
        "model": "convnet",
        "data": "digits",
        "widths": (32, 64, 64, 64),
        "batch_norm": False,
        # Seeds that no exploration of this grid had used.
        "seeds": (20, 21, 22, 23),
        "epochs": 15,
        "lr_bp": (1e-3, 2e-3, 4e-3, 8e-3),
        "lr_dbp": (2e-3, 4e-3),
        "decor_lr": (1e-3, 3e-3),
        "sample": 0.1,
        "validation_fraction": 0.2,
        # 8x8 images give a second thread little to do, and on a busy machine two threads that wait
        # for each other take many times as long as one.
        "threads": 1,
    },
}
