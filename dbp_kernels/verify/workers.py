"""Named cases in child processes that may die: each is told of once, whatever becomes of the child.

The parent (:func:`run_cases`) never touches what is tested; a child (:func:`serve`) runs one case
at a time. They speak over a socket of their own, so nothing that a case prints is in the way; and
since the socket ends with the parent, so does the child with all that it started. POSIX only.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

PASSED, FAILED, RAISED, OUT_OF_MEMORY = "passed", "failed", "raised", "out of memory"
CRASHED, HUNG, NOT_RUN = "crashed", "hung", "not run"

START_LIMIT = 60.0  # seconds
FAILED_STARTS = 3  # one after the other; then no child is started any more
_TICK = 0.1  # seconds between two looks at children that say nothing
_DYING = 1.0  # seconds that killed children are waited for; the driver may hold one for ever
_TAIL, _MOST_OUTPUT = 2000, 2**24  # characters of a child's output that are told, bytes kept
_CHANNEL = "DBP_WORKER_CHANNEL"


@dataclass(frozen=True)
class Case:
    """``name``: unique, one line. ``limit``: the most seconds it may take."""

    name: str
    limit: float


def run_cases(
    command: Sequence[str],
    cases: Sequence[Case],
    *,
    workers: int,
    deadline: float,
    record: Callable[[dict[str, Any]], None],
    env: Mapping[str, str] | None = None,
    start_limit: float = START_LIMIT,
    skip: Callable[[str], str | None] = lambda name: None,
) -> None:
    """Runs the cases in order on up to ``workers`` children, processes of ``command``.

    ``record`` is called once for every case, as soon as it is known, with {"case", "status",
    "seconds"} and what the child reported. Statuses, all but the child's own with a "reason":

    - "passed", "failed" (a wrong result) or another one: the child's word;
    - "raised": an exception, with "type", "message" and "traceback" (its last lines);
    - "out of memory";
    - "crashed": with "signal" or "exit_code", and "output", the end of what the child wrote;
    - "hung": the case's limit passed and the child's process group was killed;
    - "not run": ``deadline`` (of time.monotonic) came first, no child could be started, or ``skip``,
      which is asked by the case's name before it begins, had a reason.

    A child that is lost is replaced. ``start_limit`` seconds are allowed for what it does before its
    first case, which are not charged to the case; after three failed starts in a row there are no
    more. ``env`` is added to this process's environment. On return, and when an exception passes
    through, all process groups have been killed; it returns ``deadline`` + 2 s at the latest.
    Raises ValueError for equal names, for names of several lines and for ``workers`` below 1.
    """
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"cases must have unique names, got {names}")
    if any("\n" in name for name in names):
        raise ValueError(f"names must be single lines, got {names}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    _Pool(command, cases, workers, record, env or {}, start_limit, skip).run(deadline)


class _Child:
    """A process in a session of its own, the parent's end of its channel, what it writes."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.channel, theirs = socket.socketpair()
        # appended to, so that it can be emptied while the child writes
        self.output = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                env={**os.environ, **env, _CHANNEL: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.channel.setblocking(False)
        self.case: Case | None = None
        self.ready = self.finished = False
        self.begin = time.monotonic()  # of its start, then of its case
        self._half = b""
        self._mark = 0  # where the output of the case begins

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def hand(self, case: Case) -> None:
        """Gives it a case. A child that is gone already is noticed by its exit."""
        self.case, self.begin = case, time.monotonic()
        self._mark = os.fstat(self.output.fileno()).st_size
        with suppress(OSError):
            self.channel.sendall(case.name.encode() + b"\n")

    def messages(self) -> list[dict[str, Any]]:
        """What it has said since: whole lines only."""
        with suppress(OSError):  # nothing there, or the child is gone
            while chunk := self.channel.recv(2**16):
                self._half += chunk
        *lines, self._half = self._half.split(b"\n")
        found = []
        for line in lines:
            with suppress(ValueError):
                message = json.loads(line)
                found += [message] if isinstance(message, dict) else []
        return found

    def gone(self) -> dict[str, Any] | None:
        """How it ended, None while it runs. It stays a zombie: its group's number stays taken."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            end = os.waitid(os.P_PID, self.process.pid, flags)
        except ChildProcessError:  # the program around waits for all children, or ignores them
            return {"reason": "ended, and something else learnt how"}
        if end is None:
            return None
        if end.si_code == os.CLD_EXITED:
            return {"exit_code": end.si_status, "reason": f"exit code {end.si_status}"}
        known = {number.value: number.name for number in signal.Signals}
        name = known.get(end.si_status, f"signal {end.si_status}")
        return {"signal": name, "reason": f"killed by {name}"}

    def tail(self) -> str:
        """The end of what it wrote since its case began."""
        size = os.fstat(self.output.fileno()).st_size
        begin = max(self._mark if self._mark <= size else 0, size - _TAIL)
        return os.pread(self.output.fileno(), size - begin, begin).decode(errors="replace").strip()

    def trim(self) -> None:
        """A case that prints for ever must not fill the disk."""
        if os.fstat(self.output.fileno()).st_size > _MOST_OUTPUT:
            self.output.truncate(0)

    def kill(self) -> None:
        """Its whole group. Call :meth:`bury` after it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def bury(self, until: float) -> None:
        """Waits for its end until then, and closes what it held here."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, until - time.monotonic()))
        self.channel.close()
        self.output.close()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Within it, what handlers of SIGINT and SIGTERM raise waits: no case is between two lists then."""
    received: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = signal.SIGINT, signal.SIGTERM
        handlers = {n: handler for n in numbers if callable(handler := signal.getsignal(n))}
    try:
        for number in handlers:
            signal.signal(number, lambda *arguments: received.append(arguments))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for first, frame in received[:1]:
            handlers[first](first, frame)


class _Pool:
    """The children, and the cases that none of them has begun."""

    def __init__(
        self,
        command: Sequence[str],
        cases: Sequence[Case],
        workers: int,
        record: Callable[[dict[str, Any]], None],
        env: Mapping[str, str],
        start_limit: float,
        skip: Callable[[str], str | None],
    ) -> None:
        self.command, self.env, self.start_limit = command, env, start_limit
        self.record, self.workers, self.skip = record, workers, skip
        self.pending = deque(cases)
        self.children: list[_Child] = []
        self.selector = selectors.DefaultSelector()
        self.failed_starts, self.why_not = 0, ""

    def run(self, deadline: float) -> None:
        try:
            while self.pending or self.children:
                left = deadline - time.monotonic()
                with _signals_wait():
                    if left <= 0:
                        return self._end("the time was up")
                    self._start_children()
                    if not self.children:
                        return self._end(f"no worker starts: {self.why_not}")
                    for child in list(self.children):
                        self._look_at(child)
                self.selector.select(min(_TICK, left))
        except (KeyboardInterrupt, SystemExit):
            with _signals_wait():
                self._end("interrupted")
            raise
        finally:
            with _signals_wait():
                self._discard(*self.children)
                self.selector.close()

    def _start_children(self) -> None:
        while (
            len(self.children) < self.workers
            and sum(not child.ready for child in self.children) < len(self.pending)
            and self.failed_starts < FAILED_STARTS
        ):
            try:
                child = _Child(self.command, self.env)
            except OSError as error:
                self._failed_start(f"{type(error).__name__}: {error}")
                continue
            self.children.append(child)
            self.selector.register(child.channel, selectors.EVENT_READ)

    def _failed_start(self, why: str) -> None:
        self.failed_starts += 1
        self.why_not = why
        self.workers = max(1, self.workers - 1)  # there may be room for fewer of them

    def _look_at(self, child: _Child) -> None:
        end = child.gone()  # before its last words are read, so that none is missed
        for message in child.messages():
            self._hear(child, message)
        if not child.ready:
            late = {"reason": f"not ready within {self.start_limit:g} s"}
            if end or child.seconds > self.start_limit:
                self._failed_start(f"{(end or late)['reason']}\n{child.tail()}".strip())
                child.finished = True
        elif child.case and end:
            self._tell(child, {"status": CRASHED, **end, "output": child.tail()})
        elif child.case and child.seconds > child.case.limit:
            reason = f"no result within its limit of {child.case.limit:g} s"
            self._tell(child, {"status": HUNG, "reason": reason, "output": child.tail()})
            child.finished = True
        elif not child.case and not end and not child.finished:
            self._skip()
            if self.pending:
                child.hand(self.pending.popleft())
            else:
                child.finished = True
        if end or child.finished:
            self._discard(child)
        else:
            child.trim()

    def _skip(self) -> None:
        """Records what is next as long as there is a reason not to run it."""
        while self.pending and (why := self.skip(self.pending[0].name)):
            self._not_run(why)

    def _not_run(self, why: str) -> None:
        name = self.pending.popleft().name
        self.record({"case": name, "status": NOT_RUN, "seconds": 0.0, "reason": why})

    def _hear(self, child: _Child, message: dict[str, Any]) -> None:
        if not child.ready:
            child.ready = "ready" in message
        elif child.case and message.get("case") == child.case.name:
            self.failed_starts = 0
            child.finished = bool(message.pop("last", False))
            self._tell(child, message)

    def _tell(self, child: _Child, found: dict[str, Any]) -> None:
        case, child.case = child.case, None
        assert case
        self.record({**found, "case": case.name, "seconds": round(child.seconds, 3)})

    def _end(self, why: str) -> None:
        """Everything that has no result yet is not run."""
        busy = [child for child in self.children if child.case]
        for child in self.children:
            child.kill()
        for child in busy:
            reason = f"stopped after {child.seconds:.1f} s: {why}"
            self._tell(child, {"status": NOT_RUN, "reason": reason, "output": child.tail()})
        while self.pending:
            self._not_run(why)

    def _discard(self, *children: _Child) -> None:
        for child in children:
            child.kill()
        until = time.monotonic() + _DYING
        for child in children:
            with suppress(KeyError):  # interrupted before it was registered
                self.selector.unregister(child.channel)
            self.children.remove(child)
            child.bury(until)


# --------------------------------------------------------------------------- in the child

# After these a CUDA context is of no use, and whatever runs in it next fails for nothing.
_BROKEN = (
    "CUDA error",
    "CUDA driver error",
    "Triton Error [CUDA]",
    "cudaError",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_EXECUTION_FAILED",
)
_NO_MEMORY = ("out of memory", "can't allocate memory")
_MEMORY_ERRORS = ("MemoryError", "OutOfMemoryError")


def breaks_the_context(line: Mapping[str, object]) -> bool:
    """Whether what was recorded of a case says that its process can use the GPU no more."""
    return any(text in str(line) for text in _BROKEN)


def serve(run: Callable[[str], dict[str, Any]], ready: Callable[[], None] = lambda: None) -> None:
    """A child's main loop: runs the cases it is given by name until there are no more.

    ``ready`` comes first: what every case needs, in the time allowed for the start. ``run`` returns
    what is to be recorded of a case, in JSON's types, with "status" if it has not passed. What it
    raises is recorded too. After running out of memory, and after what may have broken the CUDA
    context, the child ends, so that the next case finds a fresh process.
    Raises RuntimeError in a process that :func:`run_cases` has not started.
    """
    if _CHANNEL not in os.environ:
        raise RuntimeError("serve is for processes that run_cases starts")
    channel = socket.socket(fileno=int(os.environ.pop(_CHANNEL)))
    channel.set_inheritable(False)
    _no_core_files()
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, names), daemon=True).start()
    ready()
    _say(channel, {"ready": True})
    while True:
        name = names.get()
        report = {"case": name, **_outcome(run, name)}
        if report["status"] == OUT_OF_MEMORY or breaks_the_context(report):
            _say(channel, {**report, "last": True})
            return
        _say(channel, report)


def _listen(channel: socket.socket, names: queue.SimpleQueue[str]) -> None:
    """Passes names on; with the parent ends this process, whatever it is doing, and all it started."""
    with suppress(OSError), channel.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            names.put(line.rstrip("\n"))
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _say(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(message, default=repr).encode() + b"\n")


def _no_core_files() -> None:
    """Of a process with a CUDA context they are gigabytes, and take seconds to write."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _outcome(run: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    try:
        found = run(name)
        if not isinstance(found, dict):
            raise TypeError(f"run must return a dict, got {found!r} for {name!r}")
        return {"status": PASSED, **found}
    except BaseException as error:  # pytest.skip and sys.exit too: a case must not end the child
        kind, message = type(error).__name__, str(error)
        memory = kind in _MEMORY_ERRORS or any(text in message.lower() for text in _NO_MEMORY)
        return {
            "status": OUT_OF_MEMORY if memory else RAISED,
            "reason": f"{kind}: {message}"[:_TAIL],
            "type": kind,
            "message": message[:_TAIL],
            "traceback": traceback.format_exc()[-_TAIL:],
        }
