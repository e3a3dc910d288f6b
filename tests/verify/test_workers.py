"""Children that die in every way: no case is lost, every limit is kept, nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dbp_kernels.verify import workers
from dbp_kernels.verify.workers import Case, run_cases, serve

CHILD = Path(__file__).parent / "toy_child.py"
ROOT = CHILD.parent.parent.parent


def environment(folder: Path) -> dict[str, str]:
    return {"TOY_FOLDER": str(folder), "TOY_WORKERS": workers.__file__}


class Toy:
    """Runs cases of the toy child; ``found`` has what was recorded, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, []

    def __call__(self, *names, how="", workers=1, limit=20.0, seconds=60.0, **options) -> dict:
        cases = [name if isinstance(name, Case) else Case(name, limit) for name in names]
        self.found = []
        run_cases(
            [sys.executable, str(CHILD), how],
            cases,
            workers=workers,
            deadline=time.monotonic() + seconds,
            record=self.found.append,
            env=environment(self.folder),
            **options,
        )
        assert sorted(r["case"] for r in self.found) == sorted(case.name for case in cases)
        json.dumps(self.found)
        return {record["case"]: record for record in self.found}

    def starts(self) -> list[int]:
        """Process numbers of all children so far."""
        path = self.folder / "starts"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def toy(tmp_path):
    toy = Toy(tmp_path)
    yield toy
    end = time.monotonic() + 10
    while alive(toy.starts()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(toy.starts())


def alive(groups: list[int]) -> list[int]:
    """The processes of these groups; one that has ended and was not waited for is not alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, group = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(group) in groups and state not in "ZX":
                found.append(int(folder.name))
    return found


def test_what_a_child_reports(toy):
    found = toy("pass", "fail", "raise", "exit", "none", "chatter", "pid")
    statuses = {name: record["status"] for name, record in found.items()}
    assert statuses == {
        "pass": "passed",
        "fail": "failed",
        "raise": "raised",
        "exit": "raised",
        "none": "raised",
        "chatter": "passed",
        "pid": "passed",
    }
    assert found["pass"]["kernel"] == "k"
    assert found["pass"]["seconds"] >= 0
    assert found["fail"]["error"] == 2.0
    wrong = found["raise"]
    assert (wrong["type"], wrong["message"]) == ("ValueError", "wrong\nin two lines")
    assert "toy_child.py" in wrong["traceback"]
    assert found["exit"]["reason"] == "SystemExit: 0"
    assert "run must return a dict, got None for 'none'" in found["none"]["reason"]
    assert found["chatter"]["seen"] == 1
    assert toy.starts() == [found["pid"]["pid"]]  # none of these needed another process


def test_what_kills_a_child_costs_one_case(toy):
    deadly = ["abort", "segfault", "silent", "half", "last words"]
    names = [name for n, case in enumerate(deadly) for name in (case, f"pass#{n}")]
    found = toy(*names)
    assert [found[name]["status"] for name in names] == ["crashed", "passed"] * len(deadly)
    assert found["abort"]["signal"] == "SIGABRT"
    assert found["segfault"]["reason"] == "killed by SIGSEGV"
    assert found["silent"]["exit_code"] == found["half"]["exit_code"] == 0
    assert found["last words"]["output"].startswith("about to die")
    assert len(toy.starts()) == 1 + len(deadly)


def test_hanging_cases_end_at_their_limits(toy):
    hanging = [Case("hang", 0.5), Case("stubborn", 1.0)]
    found = toy("pass#1", *hanging, "pass#2")
    assert [r["status"] for r in toy.found] == ["passed", "hung", "hung", "passed"]
    for case in hanging:
        assert case.limit <= found[case.name]["seconds"] < case.limit + 2
    assert "limit of 0.5 s" in found["hang"]["reason"]


@pytest.mark.parametrize("name", ["memory", "cuda memory", "grow", "broken"])
def test_after_these_the_next_case_finds_a_fresh_process(toy, name):
    found = toy("pid#1", name, "pid#2")
    assert found[name]["status"] == ("raised" if name == "broken" else "out of memory")
    assert found["pid#1"]["pid"] != found["pid#2"]["pid"]


def test_processes_that_a_case_left_behind_are_ended(toy):
    found = toy("left", "pass")
    assert found["left"]["exit_code"] == 3
    assert found["pass"]["status"] == "passed"
    assert (toy.folder / "left").exists()  # the fixture looks for it


def test_cases_are_shared_by_the_workers(toy):
    lost = ["abort", Case("hang", 0.5), "raise"]
    found = toy(*(f"slow#{n}" for n in range(6)), *lost, "pid#1", "pid#2", workers=3)
    assert sum(record["status"] == "passed" for record in found.values()) == 8
    assert len(toy.starts()) in (4, 5)  # three, and one for each that was lost and still needed


def test_no_more_workers_than_cases(toy):
    toy("pass#1", "pass#2", workers=8)
    assert len(toy.starts()) <= 2
    toy(workers=8)
    assert len(toy.starts()) <= 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_child_that_never_starts_is_given_up(toy, workers):
    found = toy("pass", "fail", how="unstartable", workers=workers)
    assert len(toy.starts()) == 3
    for record in found.values():
        assert record["status"] == "not run"
        assert "no worker starts: exit code 1\nno device here" in record["reason"]


def test_a_command_that_is_not_there(toy):
    found = []
    deadline = time.monotonic() + 9
    run_cases(["no such"], [Case("a", 1)], workers=2, deadline=deadline, record=found.append)
    assert found[0]["status"] == "not run"
    assert "FileNotFoundError" in found[0]["reason"]


def test_the_start_has_a_limit_of_its_own(toy):
    begin = time.monotonic()
    found = toy("pass", how="endless start", start_limit=0.3)
    assert time.monotonic() - begin < 10
    assert "not ready within 0.3 s" in found["pass"]["reason"]
    found = toy("pass", how="slow start", limit=1.2)
    assert found["pass"]["status"] == "passed"
    assert found["pass"]["seconds"] < 1.2


def test_the_deadline_ends_everything(toy):
    begin = time.monotonic()
    found = toy("pass", "hang", "fail", seconds=2)
    assert time.monotonic() - begin < 2 + 2 + 1
    assert found["pass"]["status"] == "passed"
    assert found["hang"]["status"] == found["fail"]["status"] == "not run"
    assert found["hang"]["reason"].startswith("stopped after")
    assert found["fail"]["reason"] == "the time was up"
    found = toy("pass", seconds=-1)
    assert found["pass"]["status"] == "not run"


def test_what_there_is_a_reason_to_skip_is_not_run(toy):
    def skip(name):
        hung = any(record["status"] == "hung" for record in toy.found)
        return "one hung already" if hung and name.startswith("hang") else None

    found = toy("hang#1", "hang#2", "pass", "hang#3", limit=0.5, skip=skip)
    assert [found[f"hang#{n}"]["status"] for n in (1, 2, 3)] == ["hung", "not run", "not run"]
    assert found["hang#3"]["reason"] == "one hung already"
    assert found["pass"]["status"] == "passed"


def test_a_program_that_ignores_the_end_of_children(toy):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        found = toy("pass#1", "abort", "pass#2")
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert [r["status"] for r in toy.found] == ["passed", "crashed", "passed"]
    assert "something else" in found["abort"]["reason"]


def test_a_record_that_raises_ends_everything(toy):
    def refuse(record):
        raise OSError("the disk is full")

    command = [sys.executable, str(CHILD)]
    env = environment(toy.folder)
    deadline = time.monotonic() + 60
    cases = [Case("pass", 9), Case("hang", 60)]
    with pytest.raises(OSError, match="full"):
        run_cases(command, cases, workers=2, deadline=deadline, record=refuse, env=env)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_at_any_moment_loses_no_case(toy, number):
    """Here in the midst of a record, where it would do most harm."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    class Impatient(list):
        def append(self, record):
            if record["status"] == "passed":
                os.kill(os.getpid(), number)
                time.sleep(0.05)
            super().append(record)

    before = signal.signal(number, interrupt)
    found = Impatient()
    command = [sys.executable, str(CHILD)]
    options = {"env": environment(toy.folder), "deadline": time.monotonic() + 60}
    cases = [Case(name, 20) for name in ("pass#1", "pass#2", "hang")]
    try:
        with pytest.raises(KeyboardInterrupt):
            run_cases(command, cases, workers=1, record=found.append, **options)
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
    assert [r["status"] for r in found] == ["passed", "not run", "not run"]


PARENT = """
import json, signal, sys, time
from dbp_kernels.verify.workers import Case, run_cases
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
cases = [Case("pass", 9), Case("hang", 600), Case("fail", 9)]
deadline = time.monotonic() + 600
def record(found):
    print(json.dumps(found), flush=True)
run_cases([sys.executable, {child!r}], cases, workers=1, deadline=deadline, record=record)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_parent_is_the_end_of_its_children(toy, number):
    env = {**os.environ, **environment(toy.folder), "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(child=str(CHILD))],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert json.loads(parent.stdout.readline())["case"] == "pass"
    time.sleep(0.2)  # it hangs by now
    os.kill(parent.pid, number)
    rest = [json.loads(line) for line in parent.communicate(timeout=20)[0].splitlines()]
    if number == signal.SIGINT:
        assert [(r["case"], r["status"]) for r in rest] == [
            ("hang", "not run"),
            ("fail", "not run"),
        ]
        assert "interrupted" in rest[0]["reason"]
    assert len(toy.starts()) == 1  # the fixture looks for it


def test_what_it_does_not_accept():
    def run(cases, workers=1):
        run_cases(["true"], cases, workers=workers, deadline=0, record=print)

    with pytest.raises(ValueError, match="unique names"):
        run([Case("a", 1), Case("a", 2)])
    with pytest.raises(ValueError, match="single lines"):
        run([Case("a\nb", 1)])
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run([Case("a", 1)], workers=0)
    with pytest.raises(RuntimeError, match="run_cases"):
        serve(dict)


def test_it_needs_no_torch():
    text = Path(workers.__file__).read_text()
    assert set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M)) <= sys.stdlib_module_names
