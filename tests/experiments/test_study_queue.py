"""The queue: what is made, in which order, and what survives being stopped, killed or raising."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("tqdm")

from experiments import queue
from experiments.queue import LOCK, Options, OutOfTime, attempt, launch, locked, make_next, work
from experiments.records import ATTEMPTS, PLANNED, read, read_run, write_planned
from experiments.study import Study, parse

TEXT = """
name: small
base: {epochs: 2}
methods:
  plain: {baseline: true, space: {optimizer.lr: {log: [0.001, 1]}}}
  decor: {space: {optimizer.lr: {log: [0.001, 1]}, decor.lr: {log: [1.0e-5, 1.0e-2]}}}
  matched: {settings_of: decor, set: {decor: null}}
trials: 2
tuning_seeds: [0]
final_seeds: [10, 11]
"""


def finish(folder: Path, status: str = "finished") -> None:
    """What the training program leaves of a run whose score is its learning rate."""
    lr = json.loads((folder / PLANNED).read_text())["config"]["optimizer.lr"]
    lines = ["epoch,seconds,validation_loss,validation_score,decorrelation_loss"]
    lines += [f"{e},{e * 1.5},{1 - lr},{lr * e}," for e in (1, 2)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    result = {"status": status, "seconds": 3.0, "flops_per_step": 7, "versions": {"torch": "x"}}
    (folder / "result.json").write_text(json.dumps(result))


class Fake:
    """A launch that notes what it is asked for, and does what ``special`` says for a run's id."""

    def __init__(self, **special: Any) -> None:
        self.made: list[str] = []
        self.special = special

    def __call__(self, folder: Path, options: Options, lock: int) -> int:
        self.made.append(folder.name)
        for name, action in self.special.items():
            if folder.name.startswith(name.replace("_", "-")):
                return action(folder)
        finish(folder)
        return 0


@pytest.fixture
def study() -> Study:
    return parse(TEXT)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path, progress=False)


def names(runs: list[str]) -> list[str]:
    return [run.rsplit("-", 1)[0] for run in runs]


def test_trials_come_first_then_the_winners_with_fresh_seeds(
    study: Study, options: Options
) -> None:
    fake = Fake()
    assert work(study, options, fake)
    assert names(fake.made) == [
        "tune-plain-t00-s0",
        "tune-decor-t00-s0",
        "tune-plain-t01-s0",
        "tune-decor-t01-s0",
        "final-plain-s10",
        "final-decor-s10",
        "final-matched-s10",
        "final-decor-s11",
        "final-matched-s11",
        "final-plain-s11",
    ]
    # The larger learning rate has the higher score, and is what the final runs have.
    _, records = read(options.root / "small")
    tried = [
        r.settings["optimizer.lr"] for r in records.values() if r.identity["method"] == "decor"
    ]
    for record in records.values():
        if record.identity["phase"] == "final":
            assert record.settings["optimizer.lr"] == max(tried)
    assert {r.status for r in records.values()} == {"finished"}


def test_one_run_after_another(
    study: Study, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Fake()
    assert work(study, options, whole)
    one_by_one = Fake()
    monkeypatch.setattr(queue, "launch_here", one_by_one)
    other = Options(options.root / "other", progress=False)
    while record := make_next(study, other):
        assert record.status == "finished"
        assert record.id == one_by_one.made[-1]
    assert one_by_one.made == whole.made


def test_a_run_that_is_lost_with_its_process_twice_has_failed(
    study: Study, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setattr(queue, "launch_here", fake)
    first = next(study.tuning_runs())
    folder = options.root / "small" / first.id
    folder.mkdir(parents=True)
    write_planned(folder, first)
    # As a process that was killed leaves it; once it may have been for want of time.
    (folder / ATTEMPTS).write_text('{"began": 1.0}\n')
    assert make_next(study, options).status == "finished"
    assert fake.made == [first.id]
    (folder / "result.json").unlink()
    (folder / ATTEMPTS).write_text('{"began": 1.0}\n{"began": 2.0}\n')
    record = make_next(study, options)
    assert (record.id, record.status) == (first.id, "failed")
    assert "lost 2 times" in record.error
    assert make_next(study, options).id != first.id
    assert len(fake.made) == 2


def test_what_is_over_is_never_made_again(study: Study, options: Options) -> None:
    assert work(study, options, Fake())
    again = Fake()
    assert work(study, options, again)
    assert again.made == []


def test_a_run_that_fails_is_recorded_and_the_others_go_on(study: Study, options: Options) -> None:
    def fail(folder: Path) -> int:
        (folder / queue.LOG).write_text("Traceback\nValueError: too large\n\n")
        return 1

    def diverge(folder: Path) -> int:
        finish(folder, "diverged")
        return 0

    fake = Fake(tune_plain_t01=fail, final_decor_s10=fail, final_plain_s11=diverge)
    assert work(study, options, fake)
    assert len(fake.made) == 10
    _, records = read(options.root / "small")
    status = {r.id.rsplit("-", 1)[0]: (r.status, r.error) for r in records.values()}
    assert status["tune-plain-t01-s0"] == ("failed", "exit status 1: ValueError: too large")
    assert status["final-plain-s11"] == ("diverged", "")
    again = Fake()
    assert work(study, options, again)
    assert again.made == []
    retry = Options(options.root, retry_failed=True, progress=False)
    work(study, retry, again)
    # Its trial came through now, and is the better one: other final runs follow, the old ones stay.
    assert names(again.made)[:1] == ["tune-plain-t01-s0"]
    _, after = read(options.root / "small")
    assert set(records) <= set(after)
    assert {r.status for r in after.values() if r.id.startswith("final-decor-s10")} == {"finished"}


def test_a_stopped_run_is_resumed(study: Study, options: Options) -> None:
    def stop(folder: Path) -> int:
        raise KeyboardInterrupt

    first = Fake(tune_plain_t01=stop)
    with pytest.raises(KeyboardInterrupt):
        work(study, options, first)
    stopped = options.root / "small" / first.made[-1]
    assert read_run(stopped).status == "unfinished"
    second = Fake()
    assert work(study, options, second)
    assert second.made[0] == first.made[-1]
    assert set(first.made[:-1]).isdisjoint(second.made)
    assert read_run(stopped).facts["attempts"] == 2


def test_a_run_in_another_queues_hands_is_left_to_it(study: Study, options: Options) -> None:
    planned = next(iter(study.tuning_runs()))
    folder = options.root / "small" / planned.id
    with locked(folder) as lock:
        assert lock is not None
        with locked(folder) as second:
            assert second is None
        fake = Fake()
        # Without it tuning is not over, so nothing is chosen yet.
        assert not work(study, options, fake)
        assert planned.id not in fake.made
        assert len(fake.made) == 3
    assert work(study, options, fake)


def test_what_another_queue_holds_is_waited_for_after_the_rest(
    study: Study, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = parse(TEXT.replace("small", "other"))
    planned = next(iter(study.tuning_runs()))
    waits = []
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(locked(options.root / "small" / planned.id)) is not None

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                stack.close()

        monkeypatch.setattr(queue.time, "sleep", sleep)
        over = queue.work_all([study, other], options, Fake())
        assert next(over).name == "other"
        assert next(over).name == "small"
    assert waits == [queue.WAIT] * 2
    (options.root / "small" / planned.id / "result.json").unlink()
    late = queue.work_all([study], replace(options, deadline=time.monotonic() - 1), Fake())
    with locked(options.root / "small" / planned.id), pytest.raises(OutOfTime):
        next(late)


def test_a_run_that_another_queue_has_just_finished_is_not_repeated(
    study: Study, options: Options
) -> None:
    planned = next(iter(study.tuning_runs()))
    folder = options.root / "small" / planned.id
    fake = Fake()
    assert attempt(folder, planned, options, fake)
    assert attempt(folder, planned, options, fake)
    assert len(fake.made) == 1


def test_the_account_of_attempts_survives_a_power_cut(study: Study, options: Options) -> None:
    planned = next(iter(study.tuning_runs()))
    folder = options.root / "small" / planned.id
    assert attempt(folder, planned, options, Fake())
    text = (folder / ATTEMPTS).read_text()
    (folder / ATTEMPTS).write_text('{"began": 1.0, "load": 0.5}\n{"outc\n' + text)
    facts = read_run(folder).facts
    assert facts["attempts"] == 2
    assert facts["wall_seconds"] >= 0


# --- with processes --------------------------------------------------------------------------------

# Stands for the worker: writes its id, holds on for so long as a file says, then has a result.
WORKER = """
import os, sys, time, pathlib
folder = pathlib.Path(sys.argv[-1])
(folder / "pid").write_text(str(os.getpid()))
print("working", flush=True)
x = sum(i * i for i in range(2_000_000))
time.sleep(float((folder / "sleep").read_text()))
(folder / "result.json").write_text('{"status": "finished"}')
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose run is ``WORKER``."""
    script = tmp_path / "script.py"
    script.write_text(WORKER)
    popen = subprocess.Popen

    def replaced(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "experiments.worker"]
        return popen([sys.executable, str(script), command[3]], **options)

    monkeypatch.setattr(subprocess, "Popen", replaced)
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def alive(folder: Path) -> bool:
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_is_waited_for_and_its_cpu_time_counted(worker: Path, study: Study) -> None:
    (worker / "sleep").write_text("0")
    planned = next(iter(study.tuning_runs()))
    assert attempt(worker, planned, Options(worker.parent), launch)
    record = read_run(worker)
    assert record.status == "finished"
    assert 0.01 < record.facts["cpu_seconds"] < 20
    assert (worker / queue.LOG).read_text() == "working\n"


def test_a_worker_is_ended_when_time_is_over(worker: Path, study: Study) -> None:
    (worker / "sleep").write_text("60")
    planned = next(iter(study.tuning_runs()))
    options = Options(worker.parent, deadline=time.monotonic() + 1.5)
    begin = time.monotonic()
    with pytest.raises(OutOfTime):
        attempt(worker, planned, options, launch)
    assert time.monotonic() - begin < 10
    assert not alive(worker)
    assert read_run(worker).status == "unfinished"
    assert json.loads((worker / ATTEMPTS).read_text().splitlines()[-1])["outcome"] == "stopped"


def test_an_orphan_keeps_its_run_locked(worker: Path) -> None:
    """As after the queue was killed: its own lock is gone, the worker's is not."""
    (worker / "sleep").write_text("60")
    with locked(worker) as lock:
        assert lock is not None
        orphan = subprocess.Popen(
            [sys.executable, "-m", "experiments.worker", str(worker)], pass_fds=(lock,)
        )
    with locked(worker) as lock:
        assert lock is None
    orphan.send_signal(signal.SIGKILL)
    orphan.wait()
    with locked(worker) as lock:
        assert lock is not None
    assert (worker / LOCK).is_file()
