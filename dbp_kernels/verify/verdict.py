"""Whether this machine's GPU has been seen to run a kernel family rightly: checked once, then kept.

The check runs in child processes (``child.py``), so that an illegal address or a hang harms nobody
else's context. What was found stays in the user's cache folder, by everything that could change it:
device, driver, torch, Triton, this package and its kernels. Only what a kernel did itself counts as
a failure; a device that is full, taken, or too slow today is "unverified", which is not kept.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dbp_kernels import user_warnings
from dbp_kernels.verify import identity
from dbp_kernels.verify.workers import (
    CRASHED,
    HUNG,
    NOT_RUN,
    OUT_OF_MEMORY,
    PASSED,
    Case,
    run_cases,
)

VARIABLE = "DBP_VERIFY"
MODES = ("once", "force", "off")
FAILED, UNVERIFIED = "failed", "unverified"
# Seconds: of one check with its compilation, and of all. Compiling takes some 30 s of one core in all,
# which the workers share.
CASE_LIMIT, LIMIT = 30.0, 90.0
WORKERS = 4
# What other users of a device cause. Nothing here is said of a kernel.
_ELSEWHERE = (
    "out of memory",
    "busy or unavailable",
    "all cuda-capable devices are busy",
    "exclusive",
    "no cuda gpus are available",
    "no cuda-capable device",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "can't allocate memory",
    "no space left on device",
)


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        family: "triton" or "cuda".
        status: "passed", "failed", or "unverified" where the device could not be checked now.
        reason: of the first failure, or why there was no check; "" if passed.
        records: one of each check, as ``checks.run`` and ``workers.run_cases`` make them.
        where: device, driver and versions, see ``identity.describe``.
        seconds: what the check took.
        when: time.time() of its end.
    """

    family: str
    status: str
    reason: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    when: float = 0.0

    @property
    def text(self) -> str:
        """One line for the environment report."""
        day = time.strftime("%Y-%m-%d", time.localtime(self.when))
        if self.status == PASSED:
            return f"verified on {self.where.get('device')}, {len(self.records)} checks, {day}"
        return f"{self.status} on {self.where.get('device')}, {day}: {self.reason}"


_known: dict[tuple[str, int], Verdict] = {}  # of this process; by family and device index
_deciding = threading.Lock()


def mode() -> str:
    """DBP_VERIFY: "once" (the default), "force" (anew in every process) or "off" (trust unseen).

    Raises ValueError for another value.
    """
    value = os.environ.get(VARIABLE) or "once"
    if value not in MODES:
        raise ValueError(f"{VARIABLE}={value!r}: expected one of {', '.join(map(repr, MODES))}")
    return value


def allowed(family: str, index: int) -> bool:
    """Whether a family's kernels may be taken on cuda:``index`` by whoever did not ask for them.

    The first call for a device may take some seconds; a failure is told in one warning. Within a
    CUDA graph's capture nothing is checked: what is not known yet is not allowed there.
    """
    verdict = _known.get((family, index))
    if verdict is None:
        if mode() == "off":
            return True
        if torch.cuda.is_current_stream_capturing():
            verdict = kept(family, index)
            return verdict is not None and verdict.status == PASSED
        with _deciding:
            verdict = _known.get((family, index))
            if verdict is None:
                verdict = _known[family, index] = _decided(family, index)
                if verdict.status != PASSED:
                    user_warnings.warn(_advice(verdict), RuntimeWarning)
    return verdict.status == PASSED


def _advice(verdict: Verdict) -> str:
    device = verdict.where.get("device")
    if verdict.status == FAILED:
        return (
            f"dbp-kernels: the {verdict.family} kernels failed their check on {device}, so plain "
            f"torch calls are used instead: {verdict.reason}. 'python -m dbp_kernels verify' checks "
            "anew once the cause is mended (no compiler, say), and writes the file to attach to a "
            "report; DBP_BACKEND=eager keeps this quiet"
        )
    return (
        f"dbp-kernels: the {verdict.family} kernels could not be checked on {device} now, so plain "
        f"torch calls are used in this run: {verdict.reason}. 'python -m dbp_kernels verify' checks "
        "them while the device is free"
    )


def withdraw(family: str, index: int, reason: str) -> None:
    """From now on this process does not take a family's kernels unasked; one warning tells why."""
    where = identity.describe(family, index)
    verdict = Verdict(family, UNVERIFIED, reason, where=where, when=time.time())
    _known[family, index] = verdict
    user_warnings.warn(_advice(verdict), RuntimeWarning)


def known(family: str, index: int) -> Verdict | None:
    """This process's or a kept verdict; never checks anything."""
    return _known.get((family, index)) or kept(family, index)


def kept(family: str, index: int) -> Verdict | None:
    """The verdict in the cache folder; None if there is none, it is not readable or does not last."""
    verdict = _read(_path(identity.describe(family, index)))
    return verdict if verdict and verdict.status != UNVERIFIED else None


def _decided(family: str, index: int) -> Verdict:
    """As ``_decide``; what keeps a check from being made is no reason to end a training run."""
    try:
        return _decide(family, index)
    except Exception as error:
        where = {"device": f"cuda:{index}"}
        reason = f"{type(error).__name__}: {error}"
        return Verdict(family, UNVERIFIED, reason, where=where, when=time.time())


def _decide(family: str, index: int) -> Verdict:
    """The kept verdict, or a check's; of many processes one checks and the others wait for it."""
    where = identity.describe(family, index)
    path = _path(where)
    begin = time.time()
    verdict = kept(family, index) if mode() == "once" else None
    if verdict:
        return verdict
    with _locked(path.with_suffix(".lock"), begin + LIMIT + CASE_LIMIT) as mine:
        verdict = _read(path)  # somebody's who had the lock before
        if verdict and verdict.when >= begin:
            return verdict
        if not mine:
            reason = "another process has been checking for too long"
            return Verdict(family, UNVERIFIED, reason, where=where, when=time.time())
        verdict = check(family, index)
        keep(verdict)
        return verdict


def check(
    family: str,
    index: int,
    scope: str = "planned",
    record: Callable[[dict[str, Any]], None] = lambda record: None,
    stop_early: bool = True,
) -> Verdict:
    """Runs a family's checks on cuda:``index`` in child processes; ``record`` hears each result.

    With ``stop_early`` nothing more begins after a failure. Keeps nothing: see ``keep``.
    """
    from dbp_kernels.verify import cases

    where = identity.describe(family, index)
    begin = time.monotonic()
    found: dict[str, dict[str, Any]] = {}

    def run(names: Sequence[str], workers: int) -> None:
        def hear(result: dict[str, Any]) -> None:
            found[result["case"]] = result
            record(result)

        def skip(name: str) -> str | None:
            failed = stop_early and any(map(_failed, found.values()))
            return "an earlier check failed" if failed else None

        run_cases(
            command(index),
            [Case(name, CASE_LIMIT) for name in names],
            workers=workers,
            deadline=begin + LIMIT * (1 if scope == "planned" else 10),
            record=hear,
            env=_environment(),
            skip=skip,
        )

    names = cases.names([family], scope, where["capability"])
    run(names, min(WORKERS, os.cpu_count() or 1))
    if any(result["status"] == HUNG for result in found.values()):
        # a busy machine, or a kernel that never ends? alone it must be quick
        again = [name for name, result in found.items() if result["status"] in (HUNG, NOT_RUN)]
        for name in again:
            del found[name]
        run(again, 1)

    records = list(found.values())
    seconds = round(time.monotonic() - begin, 1)
    bad = sorted((r for r in records if r["status"] != PASSED), key=lambda r: not _failed(r))
    status = PASSED if not bad else FAILED if _failed(bad[0]) else UNVERIFIED
    reason = told(bad[0]) if bad else ""
    return Verdict(family, status, reason, records, where, seconds, time.time())


def _failed(result: dict[str, Any]) -> bool:
    """Whether a check ended badly by the kernel's fault, and not by that of others."""
    if result["status"] in (PASSED, NOT_RUN, OUT_OF_MEMORY):
        return False
    if result["status"] == CRASHED and result.get("signal") == "SIGKILL":
        return False  # nobody but the system, short of memory, or the user does that
    text = f"{result.get('reason', '')} {result.get('output', '')}".lower()
    return result["status"] == HUNG or not any(cause in text for cause in _ELSEWHERE)


def told(found: dict[str, Any]) -> str:
    """E.g. "triton gram_shift [...] bf16: 3x3 ... crashed: killed by SIGABRT"."""
    reason = str(found.get("reason", "")).strip().splitlines()
    return f"{found['case']}: {found['status']}{': ' + reason[0][:300] if reason else ''}"


def command(index: int) -> list[str]:
    """What a child is started by.

    Raises RuntimeError in a program that has no Python interpreter but itself (PyInstaller's, say).
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise RuntimeError("there is no Python interpreter to start a check with")
    return [sys.executable, "-m", f"{__package__}.child", "--device", f"cuda:{index}"]


def _environment() -> dict[str, str]:
    """The package must be found, and nothing in the current folder in place of a module.

    No check may start another, kernels are compiled, and an error must show where it is.
    """
    root = str(Path(__file__).resolve().parents[2])
    if root in map(sysconfig.get_path, ("purelib", "platlib")):
        root = ""  # found anyway, and PYTHONPATH comes before the standard library
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        VARIABLE: "off",
        "TRITON_INTERPRET": "0",
        "CUDA_LAUNCH_BLOCKING": "1",
    }


# ------------------------------------------------------------------------------------ the cache


def folder() -> Path:
    """Where verdicts are kept: dbp-kernels in XDG_CACHE_HOME, by default ~/.cache.

    Where there is no home, a folder that cannot be made: nothing is kept.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if base.startswith("~") else base, "dbp-kernels", "verified")


def _path(where: dict[str, Any]) -> Path:
    return folder() / f"{identity.key(where)}.json"


def keep(verdict: Verdict) -> Path | None:
    """Writes the verdict for other processes; returns where, or None where it cannot be written.

    "unverified" does not take the place of what was found when the device was free.
    """
    path = _path(verdict.where)
    before = _read(path)
    if verdict.status == UNVERIFIED and before and before.status != UNVERIFIED:
        return None
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(verdict), indent=1) + "\n")
        partial.replace(path)
    except OSError:  # a home that cannot be written to: every process checks for itself
        return None
    return path


def _read(path: Path) -> Verdict | None:
    try:
        verdict = Verdict(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return verdict if verdict.status in (PASSED, FAILED, UNVERIFIED) else None


@contextmanager
def _locked(path: Path, until: float) -> Iterator[bool]:
    """Within it no other process has this lock; False if that could not be had by ``until``.

    True where the folder cannot be written to: then there is nothing to share either.
    """
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError:
        yield True
        return
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.time() > until:
                    yield False
                    return
                time.sleep(0.1)
            except OSError:  # a file system without locks
                yield True
                return
            else:
                yield True  # closing the file frees it
                return
