"""What a device check taught, put into a clone: made-up figures in files that its own code wrote."""

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import cli
from bench.core import adopt, machine, registry, results
from bench.core.adopt import CALIBRATIONS, CONFIGS, RESULTS, Refused
from bench.device import calibration, correctness, layers
from bench.device import tuning as tuning_stage
from bench.device.result import Result
from bench.device.stage import Setting
from dbp_kernels import version
from dbp_kernels.backends.triton import configs, runtime
from dbp_kernels.planning import calibration as planner_calibration
from dbp_kernels.tools import calibrate

GPU, COMMIT = "NVIDIA H100 80GB HBM3", "0123456789abcdef"
CHECK = "triton gram_shift [64x64x128 w4 s3] bf16: 3x3 72@9x7"
TUNED = "gram_shift bf16"

pytestmark = pytest.mark.skipif(not runtime.INTERPRET, reason="tunes on CPU tensors")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict:
    """Some cases of a rehearsal, run and recorded by the device check's own code."""
    stem = tmp_path_factory.mktemp("rehearsal") / "run"
    found = {"capability": 90, "families": {"triton": ""}}
    setting = Setting("cpu", rehearse=True, stem=str(stem), machine=found)
    header = {
        "format": 1,
        "command": "python -m bench device-check",
        "started": "2026-11-30T10:00:00+00:00",
        "complete": True,
        "settings": {"device": "cpu", "dtype": "bfloat16", "rehearsal": True},
        "machine": {**machine.describe("cpu"), "commit": COMMIT, "dirty": False},
        "package": {"version": version.__version__},
        "environment": {"triton": "3.6.0"},
    }
    result = Result(header, stem)
    with pytest.MonkeyPatch.context() as patch:
        shipped = configs.configs  # of which the interpreter has time for the smallest
        patch.setattr(configs, "configs", lambda *which: shipped(*which)[-1:])
        patch.setattr(tuning_stage, "_REHEARSED", (registry.conv(1, 2, 3, 1),))
        _record(result, setting)
    return json.loads(result.path.read_text())


def _record(result: Result, setting: Setting) -> None:
    tuned = [c.name for c in tuning_stage.to_time(setting) if c.name.startswith(TUNED)]
    layer = [c.name for c in layers.main_cases(setting) if c.name.startswith("dbp: ")]
    for stage, names in (
        (calibration.CALIBRATION, [case.name for case in calibration.cases(setting)]),
        (tuning_stage.TUNING, tuned),
        (layers.TIMES, layer),
    ):
        for name in names:
            line = {"status": "passed", **stage.run(name, setting), "case": name, "seconds": 0.1}
            result.add(stage.name, line)
        result.close_stage(stage.name, 1.0)
    passed = {"case": CHECK, "status": "passed", "seconds": 0.1, "kernel": "gram_shift"}
    result.add(correctness.CHECKS.name, passed)
    result.close_stage(correctness.CHECKS.name, 1.0)


@pytest.fixture
def result(rehearsed) -> dict:
    """The same as if it had run on a GPU, with figures that only one gives."""
    out = copy.deepcopy(rehearsed)
    out["settings"].update(device="cuda", rehearsal=False)
    out["machine"].update(gpu=GPU, capability="9.0")
    out["calibration"].update(device=GPU, type="cuda", capability="9.0", threads=1)
    out["calibration"]["figures"].update(
        tensor_cores={"tf32": 3e5, "bf16": 6e5, "fp16": 6e5}, kernels=[[16, 0.1]], gather=0.5
    )
    return out


@pytest.fixture
def clone(tmp_path) -> Path:
    """As much of one as adopting needs."""
    for name in (CALIBRATIONS, CONFIGS):
        shutil.copytree(machine.ROOT / name, tmp_path / "clone" / name)
    (tmp_path / "clone" / RESULTS).mkdir(parents=True)
    text = adopt.insert((machine.ROOT / "README.md").read_text(), adopt.hardware_table({}))
    (tmp_path / "clone" / "README.md").write_text(text)
    return tmp_path / "clone"


def run(result: dict, clone: Path, force: bool = False) -> int:
    file = clone.parent / "check.json"
    file.write_text(json.dumps(result))
    return adopt.main(file, force, clone)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def changed(before: dict, clone: Path) -> set[str]:
    after = contents(clone)
    assert before.keys() <= after.keys()
    return {name for name in after if before.get(name) != after[name]}


STEM = "nvidia-h100-80gb-hbm3"
EVERYTHING = {
    f"{CALIBRATIONS}/{STEM}.json",
    f"{CONFIGS}/{STEM}.json",
    f"{RESULTS}/{STEM}-0123456789.json",
    f"{RESULTS}/{STEM}-0123456789.png",
    "README.md",
}


def test_all_of_it_is_written_once(result, clone, capsys):
    before = contents(clone)
    assert run(result, clone) == 0
    printed = capsys.readouterr().out
    assert changed(before, clone) == EVERYTHING
    assert all(f"wrote {name}" in printed for name in EVERYTHING)
    before = contents(clone)
    assert run(result, clone) == 0
    assert changed(before, clone) <= {f"{RESULTS}/{STEM}-0123456789.png"}


def test_the_planner_takes_the_figures(result, clone):
    run(result, clone)
    files = sorted((clone / CALIBRATIONS).glob("*.json"))
    known = tuple(planner_calibration.read(path, path.name) for path in files)
    found = planner_calibration.nearest(known, "cuda", GPU, "9.0", 1)
    assert found.measured
    assert found.source == f"{STEM}.json"
    assert dict(found.machine.tensor_cores)["bf16"] == 6e5


def test_the_kernels_take_the_tile_shapes(result, clone, monkeypatch):
    run(result, clone)
    files = [json.loads(path.read_text()) for path in (clone / CONFIGS).glob("*.json")]
    monkeypatch.setattr(configs, "_files", lambda: tuple(files))
    configs._nearest.cache_clear()
    pinned = result["tuned"]["pinned"]["gram_shift"]["bf16"]
    assert pinned
    for entry in pinned:
        sizes = tuple(sorted(entry["sizes"].items()))
        assert configs._nearest("gram_shift", "bf16", sizes, GPU, 90)["config"] == entry["config"]
    configs._nearest.cache_clear()


def test_the_readme_has_a_row(result, clone):
    run(result, clone)
    (row,) = [line for line in (clone / "README.md").read_text().splitlines() if GPU in line]
    assert "sm_90" in row
    assert f"(bench/results/{STEM}-0123456789.json)" in row
    cases = len(list(adopt.cases(result)))
    assert f"{cases} of {cases}" in row
    later = copy.deepcopy(result)
    later["started"] = "2026-12-01T10:00:00+00:00"
    later["checks"]["times"]["cases"][0].update(status="crashed", case="triton: 3x3 9@9 b1")
    run(later, clone)
    rows = [line for line in (clone / "README.md").read_text().splitlines() if GPU in line]
    assert [name in rows[1] for name in (f"{STEM}-0123456789-2.json", "**not** triton (1)")] == [
        True,
        True,
    ]
    assert rows[0].split() == row.split()


def test_the_committed_readme_is_as_the_results_say():
    text = (machine.ROOT / "README.md").read_text()
    assert adopt.insert(text, adopt.hardware_table(adopt.committed(results.RESULTS))) == text


@pytest.mark.parametrize("text", ["none", "{0} {0} {1}", "{1} {0}", "{0} {1} {1}"])
def test_markers_out_of_order_are_refused(text):
    with pytest.raises(ValueError, match="hardware:begin"):
        adopt.insert(text.format(adopt.BEGIN, adopt.END), "table")


def refused(result: dict, clone: Path, capsys) -> str:
    before = contents(clone)
    assert run(result, clone) == 2
    assert not changed(before, clone)
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    return message


def test_a_result_of_a_machine_that_was_not_described_is_refused(result, clone, capsys):
    del result["package"]
    assert "does not say with what" in refused(result, clone, capsys)


def test_rehearsals_are_refused(rehearsed, result, clone, capsys):
    assert "rehearsal" in refused(rehearsed, clone, capsys)
    result["settings"]["rehearsal"] = True
    assert "rehearsal" in refused(result, clone, capsys)
    result["settings"].update(rehearsal=False, device="cpu")
    assert "CPU" in refused(result, clone, capsys)


def test_another_versions_result_needs_force(result, clone, capsys):
    result["package"]["version"] = "0.0.7"
    assert "of version 0.0.7" in refused(result, clone, capsys)
    assert run(result, clone, force=True) == 0


@pytest.mark.parametrize("content", ["[]", "{}", '{"checks": 3}', "{", None])
def test_other_files_are_refused(content, tmp_path, capsys):
    file = tmp_path / "some.json"
    if content is not None:
        file.write_text(content)
    assert cli.main(["report", "--adopt", str(file)]) == 2
    assert "is not adopted" in capsys.readouterr().err


def test_a_packed_folder_is_no_clone(result, tmp_path):
    with pytest.raises(Refused, match="no clone"):
        adopt.plan(result, tmp_path)


# --------------------------------------------------------------------------- what is left out


def test_a_calibration_with_a_part_missing_is_left_out(result, clone, capsys):
    result["checks"]["calibration"]["cases"][3]["status"] = "hung"
    name = result["checks"]["calibration"]["cases"][3]["case"]
    before = contents(clone)
    assert run(result, clone) == 0
    assert f"no calibration: not measured: {name}" in capsys.readouterr().out
    assert changed(before, clone) == EVERYTHING - {f"{CALIBRATIONS}/{STEM}.json"}


@pytest.mark.parametrize("figure", ["gbytes", "product"])
def test_a_calibration_the_package_cannot_read_is_left_out(result, clone, capsys, figure):
    result["calibration"]["figures"][figure] = 0
    before = contents(clone)
    assert run(result, clone) == 0
    assert f"no calibration: figures.{figure}=0" in capsys.readouterr().out
    assert f"{CALIBRATIONS}/{STEM}.json" not in changed(before, clone)


def test_a_calibration_of_something_else_is_left_out(result, clone, capsys):
    result["calibration"]["device"] = "NVIDIA A100"
    before = contents(clone)
    assert run(result, clone) == 0
    assert "no calibration: it is of NVIDIA A100" in capsys.readouterr().out
    assert not any(name.startswith(CALIBRATIONS) for name in changed(before, clone))


def without_pins(result: dict, clone: Path, capsys) -> str:
    before = contents(clone)
    assert run(result, clone) == 0
    assert f"{CONFIGS}/{STEM}.json" not in changed(before, clone)
    return capsys.readouterr().out


@pytest.mark.parametrize("status", ["failed", "crashed", "hung", "raised", "out of memory"])
def test_shapes_of_a_wrong_kernel_are_not_pinned(result, clone, capsys, status):
    result["checks"]["checks"]["cases"] = [{"case": CHECK, "status": status, "seconds": 1.0}]
    assert f"gram_shift was wrong on this GPU: {CHECK} {status}" in without_pins(
        result, clone, capsys
    )


def test_what_an_earlier_result_says_of_a_kernel_counts(result, clone, capsys):
    first = copy.deepcopy(result)
    first["checks"]["checks"]["cases"] = [{"case": CHECK, "status": "crashed", "seconds": 1.0}]
    for key in ("tuned", "calibration"):
        del first[key]
    assert "the result has none" in without_pins(first, clone, capsys)
    result["started"] = "2026-12-01T10:00:00+00:00"
    assert "was wrong on this GPU" in without_pins(result, clone, capsys)
    result["machine"]["gpu"] = result["calibration"]["device"] = "NVIDIA H200"
    run(result, clone)
    assert (clone / CONFIGS / "nvidia-h200.json").exists()


@pytest.mark.parametrize("status", ["passed", "skipped", "not run"])
def test_shapes_of_other_kernels_are(result, clone, status):
    others = ["triton gram_direct [64x64x32 w4 s3] bf16: a", "cuda gram_shift [64] bf16: b"]
    failed = [{"case": name, "status": "failed", "seconds": 1.0} for name in others]
    result["checks"]["checks"]["cases"] = [
        {"case": CHECK, "status": status, "seconds": 1.0},
        *failed,
    ]
    run(result, clone)
    assert (clone / CONFIGS / f"{STEM}.json").exists()


def test_a_shape_that_does_not_ship_is_not_pinned(result, clone, capsys):
    entries = result["tuned"]["pinned"]["gram_shift"]["bf16"]
    for entry in entries:
        entry["config"]["num_warps"] = 16
    count = len(entries)
    assert f"not pinned ({count}): the fastest of gram_shift bf16 does not ship" in without_pins(
        result, clone, capsys
    )
    result["tuned"]["pinned"] = {"no_such_kernel": {"bf16": entries}}
    assert "no_such_kernel bf16 does not ship" in without_pins(result, clone, capsys)


def test_pins_of_other_problems_stay(result, clone):
    (entry, *_) = result["tuned"]["pinned"]["gram_shift"]["bf16"]
    shipped = asdict(configs.configs("gram_shift", "bf16", 90)[0])
    old = {"sizes": entry["sizes"], "config": shipped, "seconds": {"x": 1.0}}
    other = {**old, "sizes": {key: 7 * n for key, n in entry["sizes"].items()}}
    there = {"capability": 90, "device": GPU, "origin": {}}
    there["pinned"] = {"gram_shift": {"bf16": [old, other]}, "gram_direct": {"tf32": [other]}}
    file = clone / CONFIGS / f"{STEM}.json"
    file.write_text(json.dumps(there))
    run(result, clone)
    pinned = json.loads(file.read_text())["pinned"]
    assert pinned["gram_direct"] == there["pinned"]["gram_direct"]
    assert other in pinned["gram_shift"]["bf16"]
    assert old not in pinned["gram_shift"]["bf16"]
    assert entry in pinned["gram_shift"]["bf16"]


def test_nothing_is_half_written(result, clone, monkeypatch):
    before = contents(clone)
    honest = Path.write_bytes

    def full(path: Path, content: bytes):
        if path.name.endswith(".png.partial"):
            raise OSError("no space left on device")
        return honest(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        run(result, clone)
    assert contents(clone) == before


def test_how_well_the_planner_predicted_is_said():
    def record(choice, predicted, measured, **more):
        method = {"status": "ok", "seconds": {"median": measured}, **more}
        return {"choice": choice, "predicted_seconds": predicted, "methods": {"dbp": method}}

    records = [
        record("triton_shift", 1e-3, 2e-3, replay={"median": 1e-3}),
        record("triton_shift[unfold axis 1]", 1e-3, 3e-3),
        record("triton_shift", 1e-3, 9e-3),
        record("unfold", 2.0, 1.0),
        {"choice": "unfold", "predicted_seconds": 1.0, "methods": {"dbp": {"status": "wrong"}}},
        {"methods": {"unfold": {"status": "ok", "seconds": {"median": 1.0}}}},
    ]
    assert adopt.prediction_errors({"kernels": records}) == [
        "triton_shift, as called: measured over predicted seconds 3 (2 to 9 in 3 cases)",
        "triton_shift, replayed: measured over predicted seconds 1 (1 to 1 in 1 cases)",
        "unfold, as called: measured over predicted seconds 0.5 (0.5 to 0.5 in 1 cases)",
    ]


def test_the_prediction_errors_are_printed(result, clone, capsys):
    run(result, clone)
    assert "measured over predicted seconds" in capsys.readouterr().out


def test_the_result_is_copied_whole(result, clone):
    run(result, clone)
    there = json.loads((clone / RESULTS / f"{STEM}-0123456789.json").read_text())
    assert there == json.loads(json.dumps(result))
    assert calibrate.file_name(result["calibration"]) == f"{STEM}.json"
