"""A stage: named cases that its workers run, and what parent and workers know of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dbp_kernels.verify.workers import Case

# What a case reports under this key goes into the result file: see ``result.merge``.
RESULT = "result"
SKIPPED = "skipped"  # a status of cases that do not apply here; they say why
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Setting:
    """What is the same for every case of a run.

    Attributes:
        device: "cuda:0" or "cpu".
        rehearse: tiny sizes, and cases that go wrong on purpose.
        stem: path of the result without its suffix, for what else is written.
        machine: what the stage "describe" found: see there. Empty until then.
        left: seconds that the stage has, when its cases are asked for.
    """

    device: str
    rehearse: bool = False
    stem: str = ""
    machine: dict = field(default_factory=dict)
    left: float = math.inf

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def beside(self, suffix: str) -> Path:
        """E.g. <result>-tests.jsonl."""
        return Path(f"{self.stem}{suffix}")

    def families(self) -> list[str]:
        """Kernel families that can run here: of "triton", "cuda" and "cuda_sm90"."""
        return [name for name, problem in self.machine.get("families", {}).items() if not problem]

    def to_text(self) -> str:
        """For a worker, which is told its cases' names one by one."""
        machine = {key: value for key, value in self.machine.items() if key != "checks"}
        return json.dumps({**asdict(self), "machine": machine})

    @classmethod
    def from_text(cls, text: str) -> Setting:
        return cls(**json.loads(text))


def before_colon(name: str) -> str:
    """The family of a case called "family: what"."""
    return name.split(":")[0]


@dataclass(frozen=True)
class Stage:
    """One file of this folder each; groups.py has the table.

    Attributes:
        seconds: the most it may take.
        cases: the cases, most telling first. Asked in the parent: it must not touch the GPU.
        run: (case's name, setting) -> its record, in a worker; see ``workers.serve``.
        workers: how many at a time; one, where times are measured.
        env: of the workers.
        family: (case's name) -> what its crashes and hangs are counted under.
        bare: its workers need neither torch nor a CUDA context.
    """

    name: str
    seconds: float
    cases: Callable[[Setting], Sequence[Case]]
    run: Callable[[str, Setting], dict]
    workers: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    family: Callable[[str], str] = before_colon
    bare: bool = False
