"""Verified before trusted: what a check finds decides what "auto" takes, once for all processes."""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from dbp_kernels import backends
from dbp_kernels.verify import cases, child, identity, report, verdict, workers

CHILD = Path(__file__).with_name("verify_child.py")
NAMES = [f"triton {which} [tile] bf16: 3x3" for which in ("first", "second", "third")]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A make-believe GPU whose checks end as ``gpu("crash")`` says; ``gpu.ran()``: what was run."""
    where = {"family": "triton", "device": "Make-believe 9000", "capability": 90, "driver": "1"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    monkeypatch.delenv(verdict.VARIABLE, raising=False)
    monkeypatch.setattr(identity, "describe", lambda family, index: {**where, "family": family})
    monkeypatch.setattr(cases, "names", lambda families, scope, capability: NAMES)
    monkeypatch.setattr(verdict, "WORKERS", 1)
    monkeypatch.setattr(verdict, "CASE_LIMIT", 1.0)
    monkeypatch.setattr(verdict, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def behave(how: str) -> None:
        monkeypatch.setattr(verdict, "command", lambda index: [sys.executable, str(CHILD), how])

    def ran() -> list[str]:
        file = tmp_path / "ran"
        return file.read_text().splitlines() if file.exists() else []

    behave.ran = ran
    behave.where = where
    return behave


def ask(family="triton"):
    """(allowed, warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = verdict.allowed(family, 0)
    return answer, [str(w.message) for w in caught]


def new_process():
    verdict._known.clear()


def test_passed_once_is_kept(gpu):
    gpu("right")
    assert ask() == (True, [])
    assert gpu.ran() == NAMES
    gpu("crash")  # nobody runs it any more
    assert ask() == (True, [])
    new_process()
    assert ask() == (True, [])
    assert gpu.ran() == NAMES
    assert "verified on Make-believe 9000, 3 checks" in verdict.known("triton", 0).text


@pytest.mark.parametrize(
    ("how", "said"),
    [("wrong", "failed: error 5.00e-01"), ("crash", "SIGABRT"), ("hang", "hung")],
)
def test_failed_means_eager_and_one_warning(gpu, how, said):
    gpu(how)
    answer, told = ask()
    assert not answer
    assert len(told) == 1
    for part in ("triton second [tile] bf16: 3x3", said, "verify", "Make-believe 9000"):
        assert part in told[0]
    assert ask() == (False, [])
    new_process()
    gpu("right")  # a failure is kept too: every process says so once, none checks again
    assert ask() == (False, told)


@pytest.mark.parametrize("how", ["full", "taken", "no device"])
def test_a_device_that_is_full_or_taken_is_no_failure_and_not_kept(gpu, how):
    gpu(how)
    answer, told = ask()
    assert not answer
    assert len(told) == 1
    assert "could not be checked" in told[0]
    assert ask() == (False, [])  # not again in this process
    assert verdict.kept("triton", 0) is None
    new_process()
    gpu("right")
    assert ask() == (True, [])


def test_a_full_device_today_does_not_undo_what_was_seen_before(gpu, monkeypatch):
    gpu("right")
    assert ask()[0]
    new_process()
    monkeypatch.setenv(verdict.VARIABLE, "force")
    gpu("full")
    assert not ask()[0]  # in this process
    new_process()
    monkeypatch.delenv(verdict.VARIABLE)
    assert ask() == (True, [])


def test_no_time_is_no_failure(gpu, monkeypatch):
    gpu("hang")
    monkeypatch.setattr(verdict, "LIMIT", 0.5)
    answer, told = ask()
    assert not answer
    assert "could not be checked" in told[0]
    assert verdict.kept("triton", 0) is None


def test_a_hang_that_does_not_come_again_is_a_busy_machine(gpu):
    gpu("slow")
    assert ask() == (True, [])


def test_modes(gpu, monkeypatch):
    gpu("wrong")
    monkeypatch.setenv(verdict.VARIABLE, "off")
    assert ask() == (True, [])
    assert gpu.ran() == []
    monkeypatch.setenv(verdict.VARIABLE, "once")
    assert not ask()[0]
    new_process()
    gpu("right")
    monkeypatch.setenv(verdict.VARIABLE, "force")  # anew, whatever is kept
    assert ask() == (True, [])
    new_process()
    monkeypatch.setenv(verdict.VARIABLE, "on")
    with pytest.raises(ValueError, match="DBP_VERIFY='on': expected one of 'once', 'force', 'off'"):
        verdict.allowed("triton", 0)


def test_nothing_is_checked_within_a_capture(gpu, monkeypatch):
    gpu("right")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask() == (False, [])
    assert gpu.ran() == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert ask() == (True, [])
    new_process()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask() == (True, [])  # what is kept may be used


def test_anything_that_matters_makes_a_verdict_of_its_own(gpu, monkeypatch):
    gpu("right")
    assert ask()[0]
    for change in ({"device": "Other"}, {"driver": "2"}, {"torch": "9"}, {"kernels": "changed"}):
        new_process()
        where = {**gpu.where, **change}
        monkeypatch.setattr(identity, "describe", lambda family, index, w=where: w)
        assert verdict.kept("triton", 0) is None


def test_broken_and_unwritable_caches(gpu, monkeypatch, tmp_path):
    gpu("right")
    assert ask()[0]
    [file] = verdict.folder().glob("*.json")
    file.write_text('{"family": "tri')
    new_process()
    assert ask()[0]
    assert len(gpu.ran()) == 6
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    new_process()
    assert ask()[0]
    assert len(gpu.ran()) == 9


def test_what_keeps_a_check_from_running_ends_no_training(gpu, monkeypatch):
    def broken(*arguments):
        raise ImportError("libtriton.so: undefined symbol")

    gpu("right")
    monkeypatch.setattr(cases, "names", broken)
    answer, told = ask()
    assert not answer
    assert len(told) == 1
    assert "could not be checked" in told[0]
    assert "libtriton.so: undefined symbol" in told[0]
    assert verdict.kept("triton", 0) is None


@pytest.mark.parametrize(("name", "value"), [("frozen", True), ("executable", None)])
def test_a_program_that_is_its_own_interpreter_is_not_started_again(gpu, monkeypatch, name, value):
    monkeypatch.setattr(sys, name, value, raising=False)
    answer, told = ask()
    assert not answer
    assert "no Python interpreter" in told[0]
    assert gpu.ran() == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH is of Python 3.11")
def test_the_child_imports_nothing_from_the_current_folder(tmp_path):
    (tmp_path / "dbp_kernels.py").write_text("raise SystemExit(9)\n")
    (tmp_path / "queue.py").write_text("raise SystemExit(9)\n")
    environment = {**os.environ, **verdict._environment()}
    help = [*verdict.command(0), "--help"]
    assert (
        subprocess.run(help, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL).returncode
        == 0
    )


def test_the_child_compiles_its_kernels_and_is_on_the_device(monkeypatch):
    """Else the interpreter's verdict would be kept as that of the compiled kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert verdict._environment()["TRITON_INTERPRET"] == "0"
    current = []
    monkeypatch.setattr(sys, "argv", ["child", "--device", "cuda:3"])
    monkeypatch.setattr(workers, "serve", lambda run, ready: ready())
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: current.append(device))
    child.main()  # whether kernels are usable is asked of the current device
    assert current[0] == "cuda:3"


RANK = """
import sys, time, warnings
import torch
from dbp_kernels.verify import cases, identity, verdict
torch.cuda.is_current_stream_capturing = lambda: False
identity.describe = lambda family, index: {"family": family, "device": "x", "capability": 90}
cases.names = lambda families, scope, capability: ["triton first [t] bf16: a", "triton second [t] bf16: b"]
verdict.command = lambda index: [sys.executable, sys.argv[1], sys.argv[2]]
warnings.simplefilter("ignore")
while time.time() < float(sys.argv[3]):
    time.sleep(0.01)
print(verdict.allowed("triton", 0))
"""


@pytest.mark.parametrize(
    ("how", "answer"), [("right", "True"), ("wrong", "False"), ("full", "False")]
)
def test_one_of_many_processes_checks_and_the_others_wait(gpu, how, answer):
    start = time.time() + 12  # when all have imported what they need
    command = [sys.executable, "-c", RANK, str(CHILD), how, str(start)]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHILD.parents[2])
        for _ in range(3)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [answer] * 3
    assert len(gpu.ran()) == 2


def test_auto_takes_kernels_only_after_they_passed(gpu, monkeypatch):
    usable = lambda name, device_type: "not built" if name == "cuda" else None  # noqa: E731
    monkeypatch.setattr(backends, "unusable", usable)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu("wrong")
    with pytest.warns(RuntimeWarning, match="plain torch calls are used instead"):
        assert backends.selected("cuda") == "eager"
    assert backends.selected(torch.device("cuda", 0)) == "eager"
    with backends.backend("triton"):  # who asks for them gets them
        assert backends.selected("cuda") == "triton"
    new_process()
    gpu("right")
    monkeypatch.setenv(verdict.VARIABLE, "force")
    assert backends.selected("cuda") == "triton"
    assert backends.selected("cpu") == "eager"


def test_a_backend_given_up_is_taken_no_more(gpu, monkeypatch):
    monkeypatch.setattr(backends, "unusable", lambda name, device_type: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu("right")
    device = torch.device("cuda", 0)
    assert backends.selected(device) == "triton"
    with backends.backend("triton"):  # it was asked for
        backends.give_up(device, "other ranks run on another backend")
    assert backends.selected(device) == "triton"
    with pytest.warns(RuntimeWarning, match="other ranks run on another backend"):
        backends.give_up(device, "other ranks run on another backend")
    assert backends.selected(device) == "eager"
    assert verdict.kept("triton", 0).status == "passed"  # of other processes


# ------------------------------------------------------------------------------- the command


def command(*arguments):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.main(parser.parse_args(arguments))


@pytest.fixture
def one_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cases, "available", lambda kind: {"triton": "", "cuda": "cuda: not built"})
    from dbp_kernels import info

    monkeypatch.setattr(info, "environment", lambda: {"torch": "some"})
    return gpu


def test_verify_prints_a_table_and_writes_a_file(one_gpu, capsys, tmp_path):
    one_gpu("wrong")
    assert command("--json", str(tmp_path / "report.json")) == 1
    out = capsys.readouterr().out
    assert "triton on Make-believe 9000" in out
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["first", "second", "third"]
    assert "triton second [tile] bf16: 3x3: failed: error 5.00e-01" in out
    content = json.loads((tmp_path / "report.json").read_text())
    statuses = [r["status"] for r in content["verdicts"][0]["records"]]
    assert statuses == ["passed", "failed", "passed"]  # it goes on after a failure
    assert content["environment"] == {"torch": "some"}
    assert command("--json", str(tmp_path / "report.json")) == 2  # not overwritten
    one_gpu("right")  # mended: later processes trust it again
    assert command() == 0
    new_process()
    assert ask() == (True, [])


def test_verify_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_changes_no_verdict(one_gpu, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    one_gpu("right")
    assert command() == 0
    captured = capsys.readouterr()
    assert "--json" in captured.err


def test_verify_refuses_a_device_that_is_not_there(one_gpu, capsys):
    assert command("--device", "1") == 2
    assert "--device 1: expected a number below 1" in capsys.readouterr().err


# --------------------------------------------------------------------- the real child and kernels


def kernel_names(*parts):
    names = [check.name for check in cases.checks("triton", "planned", 90)]
    return [name for name in names if any(part in name for part in parts)]


def test_real_kernels_in_a_real_child(gpu, monkeypatch):
    pytest.importorskip("triton")
    chosen = kernel_names(
        "gram_shift [16x16x64 w1 s4] bf16", "symmetric_update [16x16x32 w1 s3] ieee"
    )
    assert len(chosen) == 3
    monkeypatch.setattr(verdict, "CASE_LIMIT", 60.0)
    monkeypatch.setattr(cases, "names", lambda *arguments: chosen)
    gpu("kernels")
    assert ask() == (True, [])
    new_process()
    monkeypatch.setenv(verdict.VARIABLE, "force")
    gpu("broken kernels")
    answer, told = ask()
    assert not answer
    assert "gram_shift" in told[0]
    assert "above the bound" in told[0]
