"""The study that the device check's group ``train`` makes, rehearsed with one of digits."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")

from bench.core import report
from bench.device import train
from bench.device.stage import RESULT, SKIPPED, Setting
from dbp_kernels.verify.workers import FAILED, PASSED, breaks_the_context
from experiments import pages, queue
from experiments.study import load


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("cpu", rehearse=True, stem=str(tmp_path / "train"))


def test_every_case_is_the_next_run_and_the_archive_makes_the_page(
    setting: Setting, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    cases = train.cases(setting)
    assert [case.name for case in cases] == [f"run {n} of 10" for n in range(1, 11)]
    told = [train.run(case.name, setting) for case in cases]
    assert {line["status"] for line in told} == {PASSED}
    records = [record for line in told for record in line[RESULT]["runs"]]
    kinds = [(record["method"], record["phase"]) for record in records]
    assert kinds[:4] == [("adam", "tune"), ("dbp", "tune")] * 2
    assert sorted(kinds[4:]) == sorted(
        (method, "final") for method in ("adam", "dbp", "matched-adam") for _ in range(2)
    )
    assert all(r["status"] == "finished" and r["epochs"] == 4 for r in records)
    assert all(r["seconds"] > 0 and 0 < r["test_score"] <= 1 for r in records)
    assert train.run("run 10 of 10", setting)["status"] == SKIPPED  # there is none left

    with tarfile.open(tmp_path / "train-runs.tar.gz") as file:
        file.extractall(tmp_path / "home", filter="data")
    text = pages.make(tmp_path / "home" / "runs" / "tiny-digits", tmp_path / "home" / "results")
    assert "matched-adam" in text
    page = tmp_path / "home" / "results" / "tiny-digits"
    assert "Not over" not in (page / "report.md").read_text()
    assert len((page / "runs.csv").read_text().splitlines()) == 1 + 10
    files = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.startswith("events.")]


def test_what_was_cut_short_goes_on(setting: Setting, tmp_path: Path) -> None:
    first = train.run("run 1 of 10", setting)[RESULT]["runs"][0]
    second = train.run("run 1 of 10", setting)[RESULT]["runs"][0]  # the same command again
    assert first["run"] != second["run"]
    with tarfile.open(tmp_path / "train-runs.tar.gz") as file:
        made = {name.split("/")[2] for name in file.getnames() if name.endswith("result.json")}
    assert made == {first["run"], second["run"]}


def test_a_run_that_raises_is_told_with_its_error(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(folder: Path, data_dir: str | None) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(queue.worker, "main", failing)
    line = train.run("run 1 of 10", setting)
    assert line["status"] == FAILED
    assert "Compile with ..." in line["reason"]
    assert breaks_the_context(line)  # so that the next run has another process
    assert line[RESULT]["runs"][0]["status"] == "failed"


def test_without_data_no_run_is_begun(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "DATA", tmp_path / "nowhere")
    real = Setting("cpu", stem=setting.stem)
    (case,) = train.cases(real)
    with pytest.raises(FileNotFoundError, match=r"no test-\*\.parquet for cifar10"):
        train.run(case.name, real)


def test_the_study_is_of_ten_seeds_of_each_method_and_equal_trials() -> None:
    study = load(train.STUDY)
    assert list(study.methods) == ["sgd", "muon", "dbp-sgd", "dbp-muon"]
    assert len(study.final_seeds) == 10
    tuned = [planned.method for planned in study.tuning_runs()]
    assert {tuned.count(method) for method in study.methods} == {study.trials}
    # Where a method and DBP on it try the same setting, it has the same values.
    by_run = {(p.method, p.trial): p.settings for p in study.tuning_runs()}
    for (method, trial), settings in by_run.items():
        if method.startswith("dbp-"):
            plain = by_run[method.removeprefix("dbp-"), trial]
            assert settings == {**plain, "decor.lr": settings["decor.lr"]}


def test_a_table_of_the_runs_that_there_are() -> None:
    def record(method: str, phase: str, score: float, status: str = "finished") -> dict:
        told = {"method": method, "phase": phase, "status": status, "epochs": 8, "seconds": 2.5}
        return {**told, "run": f"{phase}-{method}", "test_score": score}

    records = [record("sgd", "final", score) for score in (0.93, 0.92, 0.94)]
    records += [record("sgd", "final", 0.1, "diverged"), record("dbp", "tune", 0.1, "failed")]
    described = {"cpu": "some CPU", "threads": 1, "torch": "2.11", "commit": None, "dirty": None}
    result = {
        "command": "python -m bench device-check train",
        "machine": described,
        "settings": {"dtype": "bfloat16"},
        "runs": json.loads(json.dumps(records)),
    }
    text = report.text_report(result)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["sgd", "final", "4", "1", "8", "2.5", "0.9300 (0.9200 to 0.9400)"] in rows
    assert ["dbp", "tune", "1", "1", "-", "-", "-"] in rows
