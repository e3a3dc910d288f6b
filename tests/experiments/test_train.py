"""A run: what it writes, how it ends, and that it goes on exactly where it was stopped."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import checkpoint, tasks
from experiments.__main__ import main
from experiments.checkpoint import random_states, set_random_states
from experiments.config import RunConfig
from experiments.energy import Meter
from experiments.metrics import COLUMNS, read
from experiments.train import Trainer, run

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]

BASE: dict[str, Any] = {
    "epochs": 3,
    "threads": 1,
    "save_model": True,
    "data": {"train_size": 300, "test_size": 100},
    "model": {"options": {"widths": [8, 8]}},
    "optimizer": {"name": "sgd", "lr": 0.05},
}
# Everything that has a state: optimisers, R, draws of samples, S, schedule.
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.05}, "schedule": {"name": "cosine"}},
    "adamw+dbp": {
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"name": "onecycle", "warmup": 0.3},
        "decor": {"lr": 1e-3, "sampling": "random", "update_every": 3},
    },
    "muon+dbp": {"optimizer": {"name": "muon", "lr": 0.02}, "decor": {"lr": 1e-3}},
    "foof+dbp": {
        "optimizer": {"name": "foof", "lr": 0.02, "options": {"every": 4}},
        "decor": {"lr": 1e-3},
    },
    "orthogonal": {"optimizer": {"name": "adam"}, "decor": {"mode": "orthogonal"}},
}


def config(**changes: Any) -> RunConfig:
    return RunConfig.from_dict({**BASE, **changes})


def outcome(directory: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], str]:
    """What must not depend on interruptions: all but seconds."""
    rows = [asdict(row) for row in read(directory / "metrics.csv")]
    for row in rows:
        del row["seconds"]
    result = json.loads((directory / "result.json").read_text())
    return rows, checkpoint.load(directory / "model.pt"), result["status"]


def assert_same(a: Path, b: Path) -> None:
    rows_a, model_a, status_a = outcome(a)
    rows_b, model_b, status_b = outcome(b)
    assert rows_a == rows_b
    assert status_a == status_b
    assert model_a.keys() == model_b.keys()
    assert all(torch.equal(model_a[name], model_b[name]) for name in model_a)


class Death(BaseException):
    pass


def dying(patch: pytest.MonkeyPatch, write: int, after: bool = False) -> None:
    """The process ends before (or after) its so-manieth file gets its name."""
    replace, done = os.replace, 0

    def dies(a: Any, b: Any) -> None:
        nonlocal done
        done += 1
        if done == write and not after:
            raise Death
        replace(a, b)
        if done == write:
            raise Death

    patch.setattr(os, "replace", dies)


# --- what comes out ---------------------------------------------------------------------------


def test_what_a_run_writes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(config(decor={"lr": 1e-3}), out, progress=False)
    assert result == json.loads((out / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["epochs"] == 3
    assert RunConfig.from_yaml(out / "config.yaml") == config(decor={"lr": 1e-3})
    rows = read(out / "metrics.csv")
    assert [row.epoch for row in rows] == [1, 2, 3]
    # 270 images to train on, in batches of 64
    assert [row.step for row in rows] == [4, 8, 12]
    assert [row.examples for row in rows] == [256, 512, 768]
    assert rows[-1].seconds == result["seconds"] > rows[0].seconds > 0
    assert rows[-1].train_loss < rows[0].train_loss
    assert rows[-1].test_score > 0.3
    assert all(row.decorrelation_loss is not None for row in rows)
    assert (out / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    left = {path.name for path in out.iterdir() if not path.name.startswith("events.")}
    assert left == {"config.yaml", "metrics.csv", "result.json", "model.pt"}


def test_evaluation_is_of_the_saved_model(tmp_path: Path) -> None:
    from experiments.tasks import Classification

    run(config(), tmp_path / "run", progress=False)
    task = Classification(config(), torch.device("cpu"))
    task.model.load_state_dict(checkpoint.load(tmp_path / "run" / "model.pt"))
    task.model.eval()
    with torch.no_grad():
        loss, score = task.evaluate("test")
    last = read(tmp_path / "run" / "metrics.csv")[-1]
    assert (loss, score) == (last.test_loss, last.test_score)


def test_evaluation_by_an_image_and_its_mirror_image() -> None:
    from experiments.tasks import Classification

    torch.manual_seed(0)
    options = {"mirrored": True, "evaluated": 30}
    task = Classification(config(options=options), torch.device("cpu"))
    task.model.eval()
    x, y = task.data.test.x, task.data.test.y
    with torch.no_grad():
        loss, score = task.evaluate("test")
        logits = (task.model(x) + task.model(x.flip(3))) / 2
        alone = task.model(x)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    assert score == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert not torch.equal(logits, alone)


def test_a_model_that_asks_for_images_is_shown_some_to_train_on() -> None:
    from experiments.tasks import Classification

    task = Classification(
        config(model={"name": "airbench", "options": {"widths": [8]}}), torch.device("cpu")
    )
    x = task.data.train.x
    expected = type(task.model)(10, 1, [8])
    expected.initialise_from(x)
    assert torch.equal(task.model.whiten.weight, expected.whiten.weight)


def test_a_seed_is_a_run(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.randn(3)  # what was drawn before does not matter
        run(config(seed=seed), tmp_path / name, progress=False)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert outcome(tmp_path / "a")[0] != outcome(tmp_path / "c")[0]


def test_checkpoints_and_evaluations_change_nothing(tmp_path: Path) -> None:
    for name, every in (("each", 1), ("none", 0), ("some", 2)):
        run(config(checkpoint_every=every), tmp_path / name, progress=False)
    assert_same(tmp_path / "each", tmp_path / "none")
    assert_same(tmp_path / "each", tmp_path / "some")


def test_flops_of_a_step(tmp_path: Path) -> None:
    """Of an MLP of 64, 20 and 10: forward, dL/dW, and dL/dx but for the images."""
    mlp = {"name": "mlp", "options": {"widths": [20], "batch_norm": False}}
    step = 2 * 64 * (2 * 64 * 20 + 3 * 20 * 10)

    def flops(name: str, **changes: Any) -> int:
        result = run(config(model=mlp, epochs=1, **changes), tmp_path / name, progress=False)
        return int(result["flops_per_step"])

    assert flops("plain") == step
    # A = W R and dL/dW = dL/dA R^T
    frozen = step + 2 * 2 * (20 * 64**2 + 10 * 20**2)
    assert flops("identity", decor={"mode": "identity"}) == frozen
    each = flops("each", decor={"lr": 1e-3}) - frozen
    assert each > 64**3
    second = flops("second", decor={"lr": 1e-3, "update_every": 2, "stagger": False}) - frozen
    assert second == pytest.approx(each / 2, rel=0.01)
    foof = {"name": "foof", "options": {"every": 1}}
    more = flops("foof", optimizer=foof) - step
    # S of all images (half or all of a symmetric product), its inverse, and gradients times that
    inverse = 64**3 + 20**3
    gram, products = 2 * 64 * (64**2 + 20**2), 2 * (20 * 64**2 + 10 * 20**2)
    assert gram / 2 <= more - inverse - products <= gram


def test_warm_up_makes_every_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of work that is done at every fourth only: or its first calls would count as training."""
    decor = {"lr": 1e-3, "update_every": 4, "stagger": False}
    trainer = Trainer(config(decor=decor, batch_size=8), torch.device("cpu"))
    made, step = [], trainer.step

    def counting(batch: Any, model: nn.Module | None = None) -> torch.Tensor:
        if model is None:  # not those whose operations are counted
            made.append(trainer.done)
        return step(batch, model)

    monkeypatch.setattr(trainer, "step", counting)
    trainer.warm_up()
    assert sum(done % 4 == 0 for done in made) >= 3
    assert trainer.done == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells it")
def test_peak_memory_is_of_this_run_alone(tmp_path: Path) -> None:
    """Not of an earlier one in the same process, nor of what has started this one."""
    ballast = torch.ones(2**29, dtype=torch.uint8)
    held = run(config(epochs=1), tmp_path / "a", progress=False)["peak_memory_bytes"]
    del ballast
    freed = run(config(epochs=1), tmp_path / "b", progress=False)["peak_memory_bytes"]
    assert freed < held - 2**28


@pytest.mark.parametrize("decor", [None, {"lr": 1e-3}])
def test_a_run_that_diverges_stops_and_says_so(tmp_path: Path, decor: Any) -> None:
    out = tmp_path / "run"
    wild = config(
        epochs=50,
        model={"options": {"widths": [8, 8], "batch_norm": False}},
        optimizer={"name": "sgd", "lr": 1e8},
        decor=decor,
    )
    result = run(wild, out, progress=False)
    assert result["status"] == "diverged"
    rows = read(out / "metrics.csv")
    assert len(rows) == result["epochs"] < 50
    assert not torch.tensor(rows[-1].train_loss).isfinite()
    assert run(wild, out, resume=True, progress=False) == result


def test_a_long_epoch_is_left_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.train.CHECK_EVERY", 2)
    wild = config(
        batch_size=8,
        model={"options": {"widths": [8], "batch_norm": False}},
        optimizer={"name": "sgd", "lr": 1e8},
    )
    result = run(wild, tmp_path / "run", progress=False)
    assert result["status"] == "diverged"
    assert read(tmp_path / "run" / "metrics.csv")[0].step < 270 // 8


@pytest.mark.parametrize(("dirty", "commit"), [(False, "c0ffee"), (True, "c0ffee+changes")])
def test_the_commit_of_a_packed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dirty: bool, commit: str
) -> None:
    from experiments import environment

    (tmp_path / "packed.json").write_text(json.dumps({"commit": "c0ffee", "dirty": dirty}))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "experiments" / "environment.py"))
    assert environment.environment()["commit"] == commit


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told of an epoch before its checkpoint was there is told once in the end."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, own = tmp_path / "run", config(checkpoint_every=2)
    with monkeypatch.context() as patch:
        dying(patch, 3)  # at the checkpoint of the second epoch, the first one's metrics are told
        with pytest.raises(Death):
            run(own, out, progress=False)
    run(own, out, resume=True, progress=False)
    events = EventAccumulator(str(out))
    events.Reload()
    rows = read(out / "metrics.csv")
    told = [(event.step, event.value) for event in events.Scalars("test_loss")]
    assert told == [(row.step, pytest.approx(row.test_loss)) for row in rows]


def test_energy_is_read_where_nvml_is(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([1000, 2000, 5500])

    class Nvml:
        @staticmethod
        def nvmlInit() -> None:
            pass

        @staticmethod
        def nvmlDeviceGetHandleByUUID(uuid: bytes) -> str:
            return uuid.decode()

        @staticmethod
        def nvmlDeviceGetTotalEnergyConsumption(handle: str) -> int:
            assert handle == "GPU-17"
            return next(readings)

    class Properties:
        uuid = 17

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    meter = Meter(torch.device("cuda"))
    assert [meter.joules(), meter.joules()] == [2.0, 5.5]
    assert Meter(torch.device("cpu")).joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    assert Meter(torch.device("cuda")).joules() is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("method", "amp", "apart"), [("adamw+dbp", "bf16", 0.02), ("foof+dbp", None, 1e-3)]
)
def test_compiled(tmp_path: Path, method: str, amp: str | None, apart: float) -> None:
    """The same training as without; what learns of layers' inputs sees them."""
    own = config(**METHODS[method], amp=amp, channels_last=True)
    last = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        run(own.override({"compile": compiled}), out, progress=False)
        row = asdict(read(out / "metrics.csv")[-1])
        last.append({key: value for key, value in row.items() if key.endswith("loss")})
    assert last[1] == pytest.approx(last[0], rel=apart)


# --- controls ---------------------------------------------------------------------------------


def test_identity_is_plain_backpropagation(tmp_path: Path) -> None:
    run(config(), tmp_path / "plain", progress=False)
    run(config(decor={"mode": "identity"}), tmp_path / "identity", progress=False)
    assert_same(tmp_path / "plain", tmp_path / "identity")


def test_orthogonal_is_plain_for_sgd_and_not_for_adam(tmp_path: Path) -> None:
    differences = {}
    for name, lr in (("sgd", 0.05), ("adam", 1e-3)):
        last = []
        for decor in (None, {"mode": "orthogonal"}):
            out = tmp_path / f"{name}-{decor is None}"
            run(config(optimizer={"name": name, "lr": lr}, decor=decor), out, progress=False)
            last.append(read(out / "metrics.csv")[-1].train_loss)
        differences[name] = abs(last[0] - last[1])
    assert differences["sgd"] < 1e-4
    assert differences["adam"] > 1e-3


# --- going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_death_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """Another process goes on, whichever file was the last to be written."""
    own = config(**METHODS["adamw+dbp"])
    run(own, tmp_path / "whole", progress=False)
    writes = 0
    while True:
        writes += 1
        out = tmp_path / f"died-{writes}"
        with monkeypatch.context() as patch:
            dying(patch, writes, after)
            try:
                run(own, out, progress=False)
                died = False
            except Death:
                died = True
        if not died:
            break
        torch.randn(5)
        run(own, out, resume=True, progress=False)
        assert_same(tmp_path / "whole", out)
    # the configuration, three epochs' checkpoint and metrics, model and result
    assert writes - 1 == 1 + 3 * 2 + 2


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Walk:
    """A task that learns to say where a walk of its own is, as an agent's environment has a state."""

    steps_per_epoch = 5

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.model: nn.Module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        self.place = torch.zeros(config.batch_size, 3)

    def batches(self, epoch: int) -> Iterator[torch.Tensor]:
        for _ in range(self.steps_per_epoch):
            self.place = self.place + torch.randn_like(self.place)
            yield self.place

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = (model(batch) - batch).square().mean()
        return loss, -loss.detach()

    def evaluate(self, split: str) -> tuple[float, float]:
        loss, score = self.loss(self.model, torch.ones(1, 3))
        return loss.item(), score.item()

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def test_a_task_with_a_state_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators and dropout, too; and the steps of the warm-up are forgotten."""
    monkeypatch.setitem(tasks.TASKS, "walk", Walk)
    own = config(task="walk", decor={"lr": 1e-3}, epochs=4)
    run(own, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        dying(patch, 6)
        with pytest.raises(Death):
            run(own, tmp_path / "died", progress=False)
    run(own, tmp_path / "died", resume=True, progress=False)
    assert_same(tmp_path / "whole", tmp_path / "died")


def program(file: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "experiments", "run", str(file), "--out", str(out)]
    command += ["--resume", "--no-progress"]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("method", "times"),
    [
        pytest.param(method, 2, id=method)
        if method == "foof+dbp"
        else pytest.param(method, 4, id=method, marks=pytest.mark.slow)
        for method in METHODS
    ],
)
def test_killed_at_random_and_resumed(tmp_path: Path, method: str, times: int) -> None:
    own = config(**METHODS[method], epochs=30)
    run(own, tmp_path / "whole", progress=False)
    file, out = tmp_path / "config.yaml", tmp_path / "killed"
    file.write_text(own.to_yaml())
    seconds = read(tmp_path / "whole" / "metrics.csv")[-1].seconds
    rng = random.Random(method)
    kills = 0
    for _ in range(times):
        process = program(file, out)
        written = out / "metrics.csv"
        before = written.stat().st_mtime_ns if written.exists() else 0
        while process.poll() is None and not (
            written.exists() and written.stat().st_mtime_ns > before
        ):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, seconds / 4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 1
    assert program(file, out).wait() == 0
    assert_same(tmp_path / "whole", out)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_share_the_batches_and_go_on(tmp_path: Path) -> None:
    """The first one is killed as it writes. The network is what one process makes of it."""
    own = config(
        epochs=12,
        model={"name": "mlp", "options": {"widths": [20], "batch_norm": False}},
        decor={"lr": 1e-2, "sample": 1.0},
        optimizer={"name": "foof", "lr": 0.02, "options": {"sample": 1.0}},
    )
    run(own, tmp_path / "alone", progress=False)
    file, out = tmp_path / "config.yaml", tmp_path / "shared"
    file.write_text(own.to_yaml())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    dying = [*torchrun, str(ROOT / "tests/experiments/dying_run.py"), str(file), str(out), "6"]
    assert subprocess.run(dying, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL).returncode
    assert (out / "checkpoint.pt").exists()
    assert not (out / "result.json").exists()
    going_on = [*torchrun, "-m", "experiments", "run", str(file), "--out", str(out), "--resume"]
    subprocess.run([*going_on, "--no-progress"], cwd=ROOT, env=ENVIRONMENT, check=True)
    rows_a, model_a, _ = outcome(tmp_path / "alone")
    rows_b, model_b, _ = outcome(out)
    assert [row["step"] for row in rows_b] == [row["step"] for row in rows_a]
    for a, b in zip(rows_a, rows_b, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    for name in model_a:
        torch.testing.assert_close(model_b[name], model_a[name], rtol=1e-3, atol=1e-4)
    flops = [
        json.loads((d / "result.json").read_text())["flops_per_step"]
        for d in (tmp_path / "alone", out)
    ]
    assert flops[0] < flops[1] < 3 * flops[0]


def test_random_states(tmp_path: Path) -> None:
    import numpy as np

    def draw() -> list[float]:
        numpy = float(np.random.random())  # noqa: NPY002
        return [random.random(), numpy, torch.rand(()).item(), random.gauss(0, 1)]

    draw()
    checkpoint.save(tmp_path / "states.pt", random_states())
    expected = draw()
    draw()
    set_random_states(checkpoint.load(tmp_path / "states.pt"))
    assert draw() == expected


def test_a_run_that_is_over_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(config(), out, progress=False)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(config(), out, resume=True, progress=False) == result
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_only_the_same_run_is_continued(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(), out, progress=False)
    with pytest.raises(FileExistsError, match="has files already"):
        run(config(), out, progress=False)
    with pytest.raises(ValueError, match=r"another run.*seed: 0, 5"):
        run(config(seed=5), out, resume=True, progress=False)
    # where the files lie is no part of it
    moved = config().override({"data.dir": "elsewhere"})
    assert run(moved, out, resume=True, progress=False)["status"] == "finished"


def test_an_atomic_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")
    with pytest.raises(TypeError):
        checkpoint.write_atomically(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    checkpoint.write_atomically(path, b"new")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"new"]


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "regression"}, "task is 'regression': expected one of"),
        ({"task": "experiments.tasks:Nothing"}, "task is 'experiments.tasks:Nothing'"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"batch_size": 1000}, "batch_size is 1000: expected at most 270"),
        ({"options": {"speed": 1}}, "options has .*speed"),
        ({"options": {"evaluated": 0}}, "options.evaluated is 0"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name is 'lion'"),
        ({"schedule": {"name": "steps"}}, "schedule.name is 'steps'"),
        ({"decor": {"include": ["nothing"]}}, "include.*nothing"),
    ],
)
def test_errors_of_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config(**changes).to_yaml())
    assert main(["run", str(file), "--out", str(tmp_path / "run"), "--no-progress"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_command_line_changes_values(tmp_path: Path) -> None:
    file, out = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(config().to_yaml())
    arguments = ["--set", "optimizer.lr=2e-3", "--set", "decor.kappa=0.2", "--set", "epochs=1"]
    assert main(["run", str(file), "--out", str(out), "--no-progress", *arguments]) == 0
    written = RunConfig.from_yaml(out / "config.yaml")
    assert written.optimizer.lr == 2e-3
    assert written.epochs == 1
    assert written.decor is not None
    assert written.decor.kappa == 0.2
