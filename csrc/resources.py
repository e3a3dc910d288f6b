"""What each kernel needs on each target: registers, spills, static shared memory, tensor cores.

    python csrc/resources.py build/cuda                    prints a table
    python csrc/resources.py build/cuda --limits FILE      and fails where a committed limit is passed
    python csrc/resources.py build/cuda --limits FILE --write

Read from ptxas' messages, which ``build.py`` keeps beside each object, and from the machine code where
cuobjdump is at hand (the CUDA toolkit's or the one in Triton's wheel).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_DTYPES = ("fp32", "tf32", "fp16", "bf16")  # enum class DType
_TENSOR = re.compile(r"\b(HGMMA|HMMA|DMMA|IMMA)\b")


@dataclass(frozen=True)
class Resources:
    """One kernel on one target. ``tensor``: its tensor-core instruction, "" if it has none."""

    registers: int
    stack: int  # bytes a thread, local arrays and spilled registers
    spilled: int  # bytes stored
    shared: int  # bytes a block, without dynamic shared memory
    tensor: str

    def over(self, limit: Resources, same_compiler: bool = True) -> list[str]:
        """What passes the limit. Another compiler may use other numbers of registers."""
        problems = [
            f"{name}: {mine}, limit {theirs}"
            for name, mine, theirs in (
                ("registers", self.registers, limit.registers),
                ("stack", self.stack, limit.stack),
                ("spilled", self.spilled, limit.spilled),
                ("shared memory", self.shared, limit.shared),
            )
            if mine > theirs and (same_compiler or name != "registers")
        ]
        if self.tensor != limit.tensor:
            problems.append(f"tensor cores: {self.tensor or 'none'}, expected {limit.tensor}")
        return problems


Report = dict[str, dict[str, Resources]]  # kernel -> target -> what it needs


def find_cuobjdump() -> str | None:
    """cuobjdump of CUDA_HOME, PATH, or Triton's wheel."""
    places = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    spec = importlib.util.find_spec("triton")
    bundled = [Path(spec.origin).parent / "backends/nvidia/bin"] if spec and spec.origin else []
    found = (shutil.which("cuobjdump", path=p) for p in (*places, None, *bundled))
    return next(filter(None, found), None)


def _demangle(names: set[str]) -> dict[str, str]:
    ordered = sorted(names)
    done = subprocess.run(
        ["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True
    )
    readable = {}
    for mangled, name in zip(ordered, done.stdout.splitlines()):
        name = re.sub(r"\([^()]*\)$", "", name)  # parameters
        name = name.removeprefix("void ").replace("dbp::", "").replace("__nv_bfloat16", "bf16")
        name = re.sub(r"\(DType\)(\d)", lambda number: _DTYPES[int(number[1])], name)
        readable[mangled] = re.sub(r"\((?:int|unsigned int|bool)\)", "", name)
    return readable


def parse_log(text: str) -> dict[tuple[str, str], tuple[int, int, int, int]]:
    """(mangled kernel, target) -> (registers, stack, spilled, shared) from ptxas' messages."""
    found = {}
    entry, function, spills = None, "", (0, 0)
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            entry = match.groups()
        elif match := _PROPERTIES.search(line):
            function = match[1]
        elif entry and function == entry[0] and (match := _SPILLS.search(line)):
            spills = int(match[1]), int(match[2])
        elif entry and (match := _USED.search(line)):
            found[entry] = (int(match[1]), *spills, int(match[2] or 0))
            entry = None
    return found


def parse_sass(text: str) -> dict[tuple[str, str], str]:
    """(mangled kernel, target) -> its tensor-core instruction."""
    found: dict[tuple[str, str], str] = {}
    target = function = ""
    for line in text.splitlines():
        if match := re.search(r"code for (sm_\w+)", line):
            target = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            function = match[1]
            found[function, target] = ""
        elif match := _TENSOR.search(line):
            found[function, target] = max(found[function, target], match[1])
    return found


def report(directory: Path) -> Report:
    """Of all objects that ``build.py`` made in ``directory``.

    Raises FileNotFoundError without objects or without cuobjdump.
    """
    cuobjdump = find_cuobjdump()
    objects = sorted(directory.glob("lib/*.o"))
    if cuobjdump is None or not objects:
        raise FileNotFoundError("cuobjdump" if cuobjdump is None else f"{directory}/lib/*.o")
    used, tensor = {}, {}
    for file in objects:
        used |= parse_log(file.with_suffix(".o.log").read_text())
        sass = subprocess.run(
            [cuobjdump, "-sass", file], capture_output=True, text=True, check=True
        )
        tensor |= parse_sass(sass.stdout)
    names = _demangle({kernel for kernel, _ in used})
    result: Report = {}
    for (kernel, target), numbers in sorted(used.items()):
        by_target = result.setdefault(names[kernel], {})
        by_target[target] = Resources(*numbers, tensor[kernel, target])
    return result


def table(found: Report) -> str:
    """The report as text, one line per kernel and target."""
    lines = [
        f"{'kernel':64} {'target':7} {'regs':>4} {'stack':>6} {'spill':>6} {'shared':>6} tensor"
    ]
    for kernel, by_target in sorted(found.items()):
        for target, r in by_target.items():
            lines.append(
                f"{kernel:64} {target:7} {r.registers:4} {r.stack:6} {r.spilled:6} {r.shared:6} "
                f"{r.tensor or '-'}"
            )
    return "\n".join(lines)


def compiler(directory: Path) -> str:
    """The version of nvcc that built there."""
    return (directory / "nvcc").read_text()


def read_limits(file: Path) -> tuple[Report, str]:
    """The committed limits, and the version of nvcc they are for."""
    content = json.loads(file.read_text())
    limits = {
        kernel: {target: Resources(*row) for target, row in by_target.items()}
        for kernel, by_target in content["kernels"].items()
    }
    return limits, content["nvcc"]


def write_limits(file: Path, found: Report, nvcc: str) -> None:
    """This report as the new limits; registers rounded up to 8, the unit they are allocated in."""
    lines = []
    for kernel, by_target in sorted(found.items()):
        rows = {}
        for target, r in by_target.items():
            registers, *rest = astuple(r)
            rows[target] = [-(-registers // 8) * 8, *rest]
        entries = ",\n".join(f"   {json.dumps(t)}: {json.dumps(row)}" for t, row in rows.items())
        lines.append(f"  {json.dumps(kernel)}: {{\n{entries}\n  }}")
    fields = json.dumps(["registers", "stack", "spilled", "shared", "tensor"])
    head = f'{{\n "nvcc": {json.dumps(nvcc)},\n "fields": {fields},\n "kernels": {{\n'
    file.write_text(head + ",\n".join(lines) + "\n }\n}\n")


def violations(found: Report, limits: Report, same_compiler: bool = True) -> list[str]:
    """Kernels and targets that pass their limit, or have none, one line each.

    Of another version of nvcc than the limits' the numbers of registers are not compared.
    """
    problems = []
    for kernel, by_target in found.items():
        for target, resources in by_target.items():
            limit = limits.get(kernel, {}).get(target)
            if limit is None:
                problems.append(f"{kernel} on {target}: no committed limit")
            else:
                problems += [
                    f"{kernel} on {target}: {p}" for p in resources.over(limit, same_compiler)
                ]
    problems += [
        f"{kernel}: a limit, but no such kernel" for kernel in limits.keys() - found.keys()
    ]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where build.py built")
    parser.add_argument("--limits", type=Path, help="JSON file of committed limits")
    parser.add_argument("--write", action="store_true", help="make this report the limits")
    arguments = parser.parse_args()
    found = report(arguments.directory)
    print(table(found))
    if arguments.limits is None:
        return 0
    if arguments.write:
        write_limits(arguments.limits, found, compiler(arguments.directory))
        return 0
    limits, nvcc = read_limits(arguments.limits)
    problems = violations(found, limits, nvcc == compiler(arguments.directory))
    print("\n".join(problems) or "all within their limits", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
