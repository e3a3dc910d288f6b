"""Stages of group ``train``: how fast the methods train, then as many epochs of BP and DBP as fit.

A case is an epoch, so that a run cut short keeps those before. One worker trains; what it holds is
lost with it, and then the rest of that method is skipped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict

from bench.core import machine
from bench.device import training
from bench.device.stage import RESULT, SKIPPED, Setting, Stage
from bench.device.training import BP, DBP, EAGER, METHODS, Images, Recipe
from dbp_kernels.verify.workers import NOT_RUN, Case

DATA = machine.ROOT / "data"  # CIFAR-10's parquet files, if there
SECONDS = 68.0  # of each method's training and tests, at most
_BESIDE = 24.0  # seconds of the stage for everything else
_FIRST, _LIMIT = 70.0, 30.0  # seconds of an epoch: of the first, with all that comes before it
_SPEED_LIMIT = 40.0  # compilation included
_WARMUP, _STEPS = 10, 30  # of the measurement of speed
_REHEARSED = Recipe(model="convnet", widths=(4, 8), batch=16, lr=0.05)


def _recipe(setting: Setting) -> Recipe:
    return _REHEARSED if setting.rehearse else Recipe()


# --------------------------------------------------------------------------- speed


def speed_cases(setting: Setting) -> list[Case]:
    return [Case(method, _SPEED_LIMIT) for method in METHODS]


def run_speed(method: str, setting: Setting) -> dict:
    """Images per second, on made-up images: nothing has to be decoded for it."""
    recipe = _recipe(setting)
    images = training.synthetic(10 * recipe.batch, 1).to(setting.torch_device)
    warmup, steps = (1, 2) if setting.rehearse else (_WARMUP, _STEPS)
    found = training.speed(method, images, recipe, warmup, steps)
    return {"images_per_second": float(f"{found:.4g}")}


# --------------------------------------------------------------------------- training


def epoch_cases(setting: Setting) -> list[Case]:
    """As many epochs as the slower method has time for; both are trained for as many.

    Without our kernels if those were tried for speed and did not survive it.
    """
    speeds = _speeds(setting)
    methods = (BP, EAGER if DBP in speeds and speeds[DBP] is None else DBP)
    known = [speeds[method] for method in methods if speeds.get(method)]
    seconds = min(SECONDS, (setting.left - _BESIDE) / len(methods))
    epochs = training.epochs_within(seconds, known) if known else training.EPOCHS[0]
    if setting.rehearse:
        epochs = 2
    return [
        Case(f"{method}: epoch {n} of {epochs}", _FIRST if n == 1 else _LIMIT)
        for method in methods
        for n in range(1, epochs + 1)
    ]


def _speeds(setting: Setting) -> dict[str, float | None]:
    """What was measured in this run, by the lines that its workers' cases left; None: it failed."""
    lines = setting.beside(".jsonl")
    cases = map(json.loads, lines.read_text().splitlines() if lines.exists() else ())
    tried = [c for c in cases if c["stage"] == SPEED.name and c["status"] != NOT_RUN]
    return {case["case"]: case.get("images_per_second") for case in tried}


@functools.cache
def _images(rehearse: bool, device: str) -> tuple[Images, str | None]:
    if rehearse:
        images, reason = training.synthetic(96, 32), "a rehearsal"
    else:
        images, reason = training.load(DATA)
    return images.to(device), reason


_running: dict[str, Iterator[dict]] = {}  # of this worker: what yields a method's next epoch


def run_epoch(name: str, setting: Setting) -> dict:
    """The next epoch of a method; the first one begins its training."""
    method, _, which = name.partition(": epoch ")
    number, _, epochs = which.partition(" of ")
    images, reason = _images(setting.rehearse, setting.device)
    recipe = _recipe(setting)
    if number == "1":
        _running[method] = training.train(method, images, int(epochs), recipe)
    run = _running.pop(method, None)  # and gone if the epoch raises
    if run is None:
        return {"status": SKIPPED, "reason": "the network was lost in an epoch before"}
    record = next(run)
    _running[method] = run
    told = {key: record[key] for key in ("train_loss", "test_accuracy", "images_per_second")}
    terms = {**asdict(recipe), "widths": str(recipe.widths), "images": images.name}
    if reason:
        terms["no_cifar10"] = reason
    return {**told, RESULT: {"training": [record], "recipe": terms}}


SPEED = Stage("speed", 65, speed_cases, run_speed)
TRAINING = Stage("training", 160, epoch_cases, run_epoch)
