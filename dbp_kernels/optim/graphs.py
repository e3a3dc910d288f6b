"""Steps replayed as CUDA graphs: one launch in place of a thousand, for steps that are alike.

A graph does again what was captured, on the memory it was captured on. Two steps are alike if they
have the same key: everything that decides what is launched, and on which memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbp_kernels import backends, user_warnings
from dbp_kernels.optim.step import Job
from dbp_kernels.phases import REPLAY, phase

WARM_UP = 2  # steps with a key before it is replayed: they compile kernels and make tables
KEPT = 8  # graphs; the one that has not been replayed for longest goes
# GUESS, not measured: a capture waits for the device and takes as long as some ten steps. Where
# more than KEPT kinds of steps alternate, there is one in so many steps.
PAUSE = 100
_REMEMBERED = 64  # keys that are counted, towards WARM_UP


@dataclass(frozen=True)
class _Replay:
    launch: Callable[[], None]
    rates: Tensor | None  # the learning rates that it reads, (jobs,); None: they cannot change


class StepGraphs:
    """The graphs of one optimiser's steps.

    A graph holds its learning rates fast at first. Where a step that is known but for its rates
    comes, it is captured once more, with rates that are read from memory: for all that may come.
    """

    def __init__(self) -> None:
        self._replays: dict[Hashable, _Replay] = {}  # the last used ones last
        self._counts: dict[int, int] = {}  # steps by hashes of their keys
        self._captures: dict[torch.device, Capture] = {}
        self._since = 0  # steps since the last capture
        self._failed = False

    def run(
        self,
        jobs: Sequence[Job],
        states: Sequence[Mapping[str, Tensor]],
        work: Callable[[Tensor | None], None],
        also: Hashable = None,
        written: Sequence[Tensor] = (),
    ) -> bool:
        """Update the jobs, if this is a step to replay or to capture. False: nothing has been done.

        A step is captured after it has been done, for those to come. If that fails, a warning says
        why, and this does nothing from then on.

        Args:
            jobs: with samples.
            states: for each the state of its R that ``work`` writes to; empty before the first time.
            work: updates them at learning rates (jobs,), or at the jobs' own if given None, by the
                same launches for the same key.
            also: whatever else decides what ``work`` launches, on which memory.
            written: what it writes to besides R and the states.
        """
        device = _device(jobs)
        if device is None or self._failed or not all(states):
            return False
        if torch.cuda.is_current_stream_capturing():  # by whoever calls step()
            return False
        self._since += 1
        key = step_key(jobs, states, device), also
        rates = tuple(job.options["lr"] for job in jobs)
        for kept in ((key, rates), (key, None)):
            if kept in self._replays:
                self._replay(kept, rates)
                # autograd counts what writes it sees, by which backward knows a graph that is stale
                torch.autograd.graph.increment_version([*(job.R for job in jobs), *written])
                return True
        fixed, free = self._count((key, rates)), self._count((key, None))
        if max(fixed, free) < WARM_UP or (len(self._replays) >= KEPT and self._since < PAUSE):
            return False
        if fixed >= WARM_UP:
            self._do_and_capture((key, rates), device, work, None)
        else:
            widest = max((job.R.dtype for job in jobs), key=lambda dtype: dtype.itemsize)
            memory = torch.tensor(rates, dtype=widest, device=device)
            self._do_and_capture((key, None), device, work, memory)
        return True

    @phase(REPLAY)
    def _replay(self, key: Hashable, rates: tuple[float, ...]) -> None:
        replay = self._replays[key] = self._replays.pop(key)
        if replay.rates is not None:
            now = torch.tensor(rates, dtype=replay.rates.dtype, device="cpu")
            replay.rates.copy_(now, non_blocking=True)
        replay.launch()

    def _count(self, key: Hashable) -> int:
        """How many steps had this key, with this one."""
        short = hash(key)
        self._counts[short] = times = self._counts.pop(short, 0) + 1
        while len(self._counts) > _REMEMBERED:
            del self._counts[next(iter(self._counts))]
        return times

    def _do_and_capture(
        self,
        key: Hashable,
        device: torch.device,
        work: Callable[[Tensor | None], None],
        rates: Tensor | None,
    ) -> None:
        work(rates)
        self._since = 0
        try:
            if device not in self._captures:
                self._captures[device] = Capture(device)
            launch = self._captures[device](partial(work, rates))
        except Exception as failure:
            self._failed = True
            self._replays.clear()
            problem: BaseException = failure
            while problem.__context__ is not None:  # the end of a capture fails too, and says less
                problem = problem.__context__
            user_warnings.warn(
                "cuda_graph=True: step() could not be captured in a CUDA graph and runs without one "
                f"from now on ({type(problem).__name__}: {problem})",
                RuntimeWarning,
            )
            return
        self._replays[key] = _Replay(launch, rates)
        if len(self._replays) > KEPT:
            del self._replays[next(iter(self._replays))]


def _device(jobs: Sequence[Job]) -> torch.device | None:
    """The one CUDA device that everything is on, else None."""
    devices = {tensor.device for job in jobs for tensor in (job.R, *job.samples)}
    if len(devices) != 1:
        return None
    (device,) = devices
    return device if device.type == "cuda" else None


def step_key(
    jobs: Sequence[Job], states: Sequence[Mapping[str, Tensor]], device: torch.device
) -> Hashable:
    """What decides which launches update the jobs, and on which memory; but the learning rates."""
    return (
        backends.selected(device),
        torch.are_deterministic_algorithms_enabled(),
        *(_job_key(job, state) for job, state in zip(jobs, states)),
    )


def _job_key(job: Job, state: Mapping[str, Tensor]) -> Hashable:
    return (
        *(job.options[name] for name in ("kappa", "rule", "demean", "clip")),
        *job.layer._patch_geometry().values(),
        *map(_layout, (job.R, *state.values(), *job.samples)),
    )


def _layout(tensor: Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class Capture:
    """Captures work on one device. All its graphs share their memory: they never run at once.

    A graph's temporary memory stays its own for as long as there is one; what the libraries need on
    the stream of captures (cuBLAS's workspace) is part of it, so that nobody else can free that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> Callable[[], None]:
        """What does the ``work`` again, on the current stream. Now it is not done, only captured."""
        graph = torch.cuda.CUDAGraph()
        # other threads may do as they like meanwhile: one that pins batches calls CUDA all the time
        options: dict[str, Any] = {
            "pool": self._pool,
            "stream": self._stream,
            "capture_error_mode": "thread_local",
        }
        # a capture that fails leaves its own stream current: the outer block leaves it
        with torch.cuda.stream(torch.cuda.current_stream(self._device)):
            try:
                with torch.cuda.graph(graph, **options):
                    work()
            except BaseException:
                with suppress(RuntimeError):  # torch 2.11's allocator goes on for the failed one
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                raise
        return graph.replay
