"""``python -m bench report --adopt FILE``: puts what a device check found into this clone.

The planner's calibration of the GPU, its fastest tile shapes, the README's table, the result with
its plot: all of them are written, or none. What the result does not hold whole, or what is of a
kernel that was wrong, is left out and named.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.core import bars, machine, report
from bench.core.results import to_text
from bench.core.table import format_table
from bench.device.calibration import CALIBRATION
from bench.device.correctness import CHECKS, CONFIGURATIONS, kernel_of
from bench.device.stage import SKIPPED
from dbp_kernels import version
from dbp_kernels.planning import calibration
from dbp_kernels.tools import calibrate
from dbp_kernels.tools.origin import slug
from dbp_kernels.verify.workers import NOT_RUN, PASSED

CALIBRATIONS = "dbp_kernels/planning/calibrations"
CONFIGS = "dbp_kernels/backends/triton/configs"
RESULTS = "bench/results"


class Refused(Exception):
    """Nothing of the result may be adopted; says why."""


@dataclass
class Adoption:
    """What is to be written, {path in the clone: content}, and one sentence on each decision."""

    files: dict[str, bytes] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def main(path: Path, force: bool, root: Path = machine.ROOT) -> int:
    """Adopts a result file and prints what changed; returns the exit status."""
    try:
        adoption = plan(read(path), root, force)
    except Refused as reason:
        print(f"{path} is not adopted: {reason}", file=sys.stderr)
        return 2
    changed = write(adoption.files, root)
    print("\n".join(adoption.said))
    print("\n".join(f"wrote {name}" for name in changed) or "nothing changed")
    return 0


def read(path: Path) -> dict:
    """A device check's result file. Raises Refused if it is none."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"not a result file: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("checks"), dict):
        raise Refused("not the result of a device check")
    return result


def plan(result: dict, root: Path, force: bool = False) -> Adoption:
    """What adopting a result would write into the clone at ``root``. Raises Refused."""
    if not ran_on_gpu(result):
        raise Refused("it is of a rehearsal or a CPU, which say nothing about a GPU")
    if not {"package", "environment"} <= result.keys():
        raise Refused("it does not say with what it was made")
    of = _origin(result)[1]
    if of != version.__version__ and not force:
        raise Refused(f"it is of version {of}, this is {version.__version__}; --force adopts it")
    if not (root / CONFIGS).is_dir():
        raise Refused(f"{root} is no clone of the package")
    adoption = Adoption()
    before = committed(root / RESULTS)
    _calibration(result, adoption)
    _pins(result, [*before.values()], root, adoption)
    name = _name(result, before)
    adoption.files[f"{RESULTS}/{name}.json"] = to_text(result).encode()
    picture = _picture(result)
    if picture:
        adoption.files[f"{RESULTS}/{name}.png"] = picture
    results = {**before, f"{name}.json": result}
    results = dict(sorted(results.items(), key=lambda item: item[1]["started"]))
    try:
        readme = insert((root / "README.md").read_text(), hardware_table(results))
    except ValueError as error:
        raise Refused(f"README.md: {error}") from None
    adoption.files["README.md"] = readme.encode()
    adoption.said += prediction_errors(result)
    return adoption


# --------------------------------------------------------------------------- the planner's figures


def _calibration(result: dict, adoption: Adoption) -> None:
    content, stage = result.get("calibration"), CALIBRATION.name
    if not content:
        adoption.said.append("no calibration: the result has none")
        return
    if content["device"] != result["machine"]["gpu"]:
        adoption.said.append(f"no calibration: it is of {content['device']}")
        return
    missing = [c["case"] for c in cases(result, [stage]) if c["status"] != PASSED]
    if missing:
        adoption.said.append(f"no calibration: not measured: {', '.join(missing)}")
        return
    name, text = calibrate.file_name(content), calibrate.to_text(content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(text)
        try:
            calibration.read(path, "no calibration")
        except ValueError as error:
            adoption.said.append(str(error))
            return
    adoption.files[f"{CALIBRATIONS}/{name}"] = text.encode()
    adoption.said.append(f"calibration of {content['device']}: {len(content['figures'])} figures")


# --------------------------------------------------------------------------- tile shapes


def _pins(result: dict, before: list[dict], root: Path, adoption: Adoption) -> None:
    """Pins what the GPU's file lacks, and replaces what it has of the same problems."""
    name = f"{slug(result['machine']['gpu'])}.json"
    entries = [*_trusted(result, before, adoption)]
    if not entries:
        adoption.said.append("no tile shapes are pinned")
        return
    described = result["machine"]
    path = root / CONFIGS / name
    pinned = json.loads(path.read_text())["pinned"] if path.exists() else {}
    for kernel, precision, entry in entries:
        rows = pinned.setdefault(kernel, {}).setdefault(precision, [])
        rows[:] = [row for row in rows if row["sizes"] != entry["sizes"]]
        rows.append(entry)
    content = {
        "capability": _capability(result),
        "device": described["gpu"],
        "origin": {key: described.get(key) for key in ("torch", "commit", "dirty")},
        "pinned": pinned,
    }
    adoption.files[f"{CONFIGS}/{name}"] = (json.dumps(content, indent=1) + "\n").encode()
    kernels = ", ".join(sorted({kernel for kernel, _, _ in entries}))
    adoption.said.append(f"{len(entries)} tile shapes are pinned, of {kernels}")


def _capability(result: dict) -> int:
    return int(result["machine"]["capability"].replace(".", ""))


def _trusted(
    result: dict, before: list[dict], adoption: Adoption
) -> Iterator[tuple[str, str, dict]]:
    """(kernel, precision, what tuning found for a problem) of everything that may be pinned.

    That is of shapes that ship, and of kernels that no check on this GPU found wrong.
    """
    from dbp_kernels.backends.triton import configs

    wrong = _wrong_kernels([result, *before], result)
    left_out: dict[str, int] = {}
    for kernel, precision, entry in _tuned(result):
        try:
            shipped = configs.configs(kernel, precision, _capability(result))
        except KeyError:
            shipped = ()
        if kernel in wrong:
            reason = f"{kernel} was wrong on this GPU: {wrong[kernel]}"
        elif configs.Config(**entry["config"]) not in shipped:
            reason = f"the fastest of {kernel} {precision} does not ship"
        else:
            yield kernel, precision, entry
            continue
        left_out[reason] = left_out.get(reason, 0) + 1
    adoption.said += [f"not pinned ({count}): {reason}" for reason, count in left_out.items()]


def _tuned(result: dict) -> Iterator[tuple[str, str, dict]]:
    for kernel, by_precision in result.get("tuned", {}).get("pinned", {}).items():
        for precision, entries in by_precision.items():
            yield from ((kernel, precision, entry) for entry in entries)


def _wrong_kernels(results: list[dict], like: dict) -> dict[str, str]:
    """{Triton kernel: a case in which it failed}, of this version of the package on this GPU."""
    wrong = {}
    for result in results:
        if _origin(result) != _origin(like):
            continue
        stages = (CHECKS.name, CONFIGURATIONS.name)
        for case in filter(failed, cases(result, stages)):
            family, _, kernel = kernel_of(case["case"]).partition(" ")
            if family == "triton":
                wrong.setdefault(kernel, f"{case['case']} {case['status']}")
    return wrong


def _origin(result: dict) -> tuple[str, str]:
    """(GPU, version of the package)."""
    return result["machine"]["gpu"], result["package"]["version"]


# --------------------------------------------------------------------------- the result


def _name(result: dict, before: dict[str, dict]) -> str:
    """<gpu>-<commit>, with a number if another result has that name; its own if it is there."""
    for name, there in before.items():
        if to_text(there) == to_text(result):
            return name.removesuffix(".json")
    commit = (result["machine"]["commit"] or "unknown")[:10]
    stem = f"{slug(result['machine']['gpu'])}-{commit}"
    names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
    return next(name for name in names if f"{name}.json" not in before)


def _picture(result: dict) -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        return path.read_bytes() if report.plot(result, path) else None


def prediction_errors(result: dict) -> list[str]:
    """How the measured seconds of patch_gram compare with the planner's, by its choice."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for record in result.get("kernels", ()):
        ours, predicted = record["methods"].get(bars.OURS, {}), record.get("predicted_seconds")
        for key, how in (("seconds", "as called"), ("replay", "replayed")):
            if key in ours and predicted:
                family = record["choice"].partition("[")[0]
                ratios.setdefault((family, how), []).append(ours[key]["median"] / predicted)
    return [
        f"{family}, {how}: measured over predicted seconds {statistics.median(found):.3g} "
        f"({min(found):.3g} to {max(found):.3g} in {len(found)} cases)"
        for (family, how), found in sorted(ratios.items())
    ]


def write(files: dict[str, bytes], root: Path) -> list[str]:
    """Writes what differs: all of it beside its place first, then all into place. Returns names."""
    changed = {}
    for name, content in files.items():
        path = root / name
        if not path.exists() or path.read_bytes() != content:
            changed[path] = path.with_name(f".{path.name}.partial")
    try:
        for path, partial in changed.items():
            partial.write_bytes(files[path.relative_to(root).as_posix()])
        for path, partial in changed.items():
            partial.replace(path)
    finally:
        for partial in changed.values():
            partial.unlink(missing_ok=True)
    return [path.relative_to(root).as_posix() for path in changed]


# --------------------------------------------------------------------------- the README's table of GPUs

BEGIN, END = "<!-- hardware:begin -->", "<!-- hardware:end -->"
NOTHING = "No device check has run on a GPU yet."


def ran_on_gpu(result: dict) -> bool:
    """Whether it is a device check's result, not of a rehearsal."""
    settings = result.get("settings", {})
    on_gpu = settings.get("device") == "cuda" and "gpu" in result.get("machine", {})
    return "checks" in result and on_gpu and not settings.get("rehearsal")


def committed(folder: Path) -> dict[str, dict]:
    """{file name: result} of all device checks in a folder, oldest first."""
    results = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    found = [(name, result) for name, result in results.items() if ran_on_gpu(result)]
    return dict(sorted(found, key=lambda item: item[1]["started"]))


def cases(result: dict, stages: Sequence[str] = ()) -> Iterator[dict]:
    """The records of the cases of some stages, by default of all, but of those that did not apply."""
    for stage, check in result["checks"].items():
        if not stages or stage in stages:
            yield from (case for case in check["cases"] if case["status"] != SKIPPED)


def failed(case: dict) -> bool:
    return case["status"] not in (PASSED, NOT_RUN)


def hardware_table(results: dict[str, dict]) -> str:
    """One row a result; links are relative to the clone."""
    if not results:
        return NOTHING
    rows = [["GPU", "with", "result", "cases passed", "figures held to bars"]]
    rows += [[*_row(name, result)] for name, result in results.items()]
    return format_table(rows)


def _row(name: str, result: dict) -> Iterator[str]:
    machine, environment = result["machine"], result["environment"]
    yield f"{machine['gpu']}, sm_{machine['capability'].replace('.', '')}"
    triton = environment.get("triton")
    yield f"torch {machine['torch']}" + (f", Triton {triton}" if triton else "")
    commit = (machine["commit"] or "no commit")[:10] + (" + changes" if machine["dirty"] else "")
    yield f"[{commit}](bench/results/{name}), {result['started'][:10]}"
    yield _passed(result)
    held = [v for v in bars.evaluate(result) if v.figure is not None]
    yield "; ".join(f"{v.bar.text}: {v.figure:.3g} {v.status}" for v in held) or "none"


def _passed(result: dict) -> str:
    """How many of those that were run, and of which kinds those are that did not pass."""
    run = [case for case in cases(result) if case["status"] != NOT_RUN]
    text = f"{sum(case['status'] == PASSED for case in run)} of {len(run)}"
    wrong: dict[str, int] = {}
    for case in filter(failed, run):
        kind = " ".join(case["case"].split(":")[0].split()[:2])
        wrong[kind] = wrong.get(kind, 0) + 1
    names = ", ".join(f"{kind} ({n})" for kind, n in wrong.items())
    return f"{text}; **not** {names}" if names else text


def insert(text: str, table: str) -> str:
    """The text with a table between its markers. Raises ValueError if they are not there once."""
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end) or any(mark in old + after for mark in (BEGIN, END)):
        raise ValueError(f"expected one {BEGIN} and, after it, one {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
