"""A study's page: numbers and verdicts from made-up runs, and a tiny study from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from experiments.__main__ import main
from experiments.analysis import analyse
from experiments.choice import winners
from experiments.pages import make, verdicts
from experiments.records import Record, read, write_tables
from experiments.statistics import median
from experiments.study import PlannedRun, Study, parse

SEEDS = list(range(10, 18))
TEXT = f"""
name: small
title: A small study
question: Does it?
base: {{epochs: 4}}
methods:
  plain: {{baseline: true, space: {{optimizer.lr: {{log: [0.001, 1]}}}}}}
  slow: {{baseline: true, space: {{optimizer.lr: {{log: [0.001, 1]}}}}}}
  decor: {{space: {{optimizer.lr: {{log: [0.001, 1]}}, decor.kappa: {{choice: [0.0, 0.5]}}}}}}
  matched: {{settings_of: decor, set: {{decor: null}}}}
trials: 2
tuning_seeds: [0]
final_seeds: {SEEDS}
"""
# By method: the test score after each epoch, and the seconds of an epoch.
CURVES = {
    "plain": ([0.1, 0.4, 0.5, 0.6], 10.0),
    "slow": ([0.1, 0.2, 0.3, 0.4], 10.0),
    "decor": ([0.2, 0.6, 0.7, 0.7], 12.0),
    "matched": ([0.1, 0.4, 0.5, 0.55], 10.0),
}


def record(planned: PlannedRun, status: str = "finished") -> Record:
    scores, seconds = CURVES[planned.method]
    # Seeds differ by a little, all methods of one seed by the same.
    shift = 0.001 * (planned.seed - 14)
    rows = []
    for epoch, score in enumerate(scores, start=1):
        time = epoch * seconds * (1 + shift)
        values = {"epoch": epoch, "step": 5 * epoch, "examples": 320 * epoch, "seconds": time}
        for split in ("train", "validation", "test"):
            values |= {f"{split}_score": score + shift, f"{split}_loss": 1 - score}
        rows.append({name: float(value) for name, value in values.items()})
    identity = {n: getattr(planned, n) for n in ("group", "method", "phase", "trial", "seed")}
    facts = {
        "seconds": rows[-1]["seconds"],
        "flops_per_step": 2e12,
        "cpu_seconds": 90.0,
        "load": 1.0,
    }
    environment = {"versions": {"torch": "2.x"}, "commit": "abc"}
    return Record(planned.id, identity, planned.settings, status, rows, facts, "", environment)


def everything(study: Study, folder: Path, **lost: str) -> dict[str, Record]:
    """All runs of the study; ``lost``: methods whose first final run ends in another way."""
    records = {run.id: record(run) for run in study.tuning_runs()}
    for run in study.final_runs(winners(study, records, folder)):
        first = run.seed == SEEDS[0]
        records[run.id] = record(run, lost.get(run.method, "finished") if first else "finished")
    return records


@pytest.fixture
def study() -> Study:
    return parse(TEXT)


def test_target_and_times_are_those_of_the_best_baseline(study: Study, tmp_path: Path) -> None:
    found = analyse(study, everything(study, tmp_path), tmp_path)
    (group,) = found.groups
    assert (group.baseline, found.missing, found.superseded) == ("plain", 0, [])
    # Final scores are 0.6 and up to 0.004 off: half of the seeds have the low median, or more.
    assert group.target == pytest.approx(0.599)
    plain, decor = group.lines["plain"], group.lines["decor"]
    assert plain.reached == 5
    assert (decor.reached, group.lines["slow"].reached) == (8, 0)
    epochs = decor.times["epochs"]
    assert epochs[14] == pytest.approx(1 + 0.399 / 0.4)
    assert decor.times["seconds"][14] == pytest.approx(12 * (1 + 0.399 / 0.4))
    assert decor.times["examples"][14] == pytest.approx(320 * (1 + 0.399 / 0.4))
    assert decor.times["TFLOP"][14] == pytest.approx(2 * 5 * (1 + 0.399 / 0.4))
    assert decor.against_baseline["seconds"].verdict == "gain"
    assert decor.against_baseline["seconds"].p == 2 / 2**8
    slow = group.lines["slow"].against_baseline["seconds"]
    assert (slow.verdict, slow.value, slow.p) == ("loss", math.inf, 2 / 2**8)
    assert group.lines["slow"].against_baseline["score"].verdict == "loss"
    assert not decor.against_parent
    assert group.lines["matched"].against_parent["epochs"].verdict == "loss"


def test_a_baselines_miss_is_its_whole_run_against_others(study: Study, tmp_path: Path) -> None:
    """Three of plain's seeds end below the target: they would make every ratio's median fragile."""
    found = analyse(study, everything(study, tmp_path), tmp_path)
    lines = found.groups[0].lines
    times = list(lines["plain"].times["epochs"].values())
    assert times.count(math.inf) == 3
    comparison = lines["decor"].against_baseline["epochs"]
    assert comparison.value == pytest.approx(
        median(list(lines["decor"].times["epochs"].values())) / median([min(t, 4) for t in times])
    )
    assert comparison.interval is not None
    assert 0.4 < comparison.interval[0] < comparison.interval[1] < 0.6
    # Against a control's parent, and of a baseline's run that was lost, a miss is one.
    lost = analyse(study, everything(study, tmp_path, plain="failed"), tmp_path).groups[0].lines
    assert lost["decor"].against_baseline["epochs"].better == 8
    assert lost["slow"].against_baseline["epochs"].worse == 7


def test_a_final_run_that_is_lost_is_a_miss_and_not_left_out(study: Study, tmp_path: Path) -> None:
    for status in ("diverged", "failed"):
        found = analyse(study, everything(study, tmp_path, decor=status), tmp_path)
        line = found.groups[0].lines["decor"]
        assert line.scores[SEEDS[0]] == -math.inf
        assert len(line.times["seconds"]) == 8
    # It had been at the target before it diverged: the time stands, the final score is lost.
    assert line.reached == 8


def test_a_study_that_is_not_over_says_so(study: Study, tmp_path: Path) -> None:
    records = everything(study, tmp_path)
    finals = [run for run in records if run.startswith("final")]
    for run in finals[5:]:
        del records[run]
    found = analyse(study, records, tmp_path)
    assert found.missing == len(finals) - 5
    assert verdicts(found)[0] == f"**Not over:** {len(finals) - 5} runs are still to be made."
    tuning = {run: r for run, r in records.items() if run.startswith("tune-decor")}
    found = analyse(study, tuning, tmp_path)
    assert (found.missing, found.groups) == (4 + 32, [])
    write_tables(tmp_path / "small", study, tuning)
    make(tmp_path / "small")
    assert "Not over" in (tmp_path / "small" / "report.md").read_text()
    assert (tmp_path / "small" / "tuning.png").is_file()


def test_a_page_has_every_run_and_can_be_made_again(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    records = everything(study, folder, slow="diverged", decor="failed")
    old = next(iter(parse(TEXT.replace("epochs: 4", "epochs: 3")).tuning_runs()))
    records[old.id] = record(old)
    write_tables(folder, study, records)
    printed = make(folder)
    assert "gain in seconds" in printed
    assert "decor against plain" in printed
    page = (folder / "report.md").read_text()
    table = page[page.index("## Every run") :].splitlines()[4:]
    assert len(table) == len(records)
    assert sum("diverged" in line for line in table) == 1
    assert sum("failed" in line for line in table) == 1
    assert sum("(superseded)" in line for line in table) == 1
    assert f"{len(records)} runs took {len(records) * 90 / 3600:.2f} hours of CPU time" in page
    assert "torch 2.x" in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (folder / line[line.index("](") + 2 : -1]).read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((folder / "result.json").read_text())
    methods = numbers["groups"]["all"]["methods"]
    assert methods["decor"]["against_baseline"]["seconds"]["verdict"] == "gain"
    assert methods["slow"]["to_target"]["seconds"]["median"] is None
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".png"}
    assert make(folder) == printed
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".png"} == before


def test_tables_bring_back_what_they_were_made_of(study: Study, tmp_path: Path) -> None:
    records = everything(study, tmp_path)
    failed = Record("x", {**next(iter(records.values())).identity}, {}, "failed", [], {}, 'a, "b"')
    write_tables(tmp_path / "small", study, {**records, "x": failed})
    again, back = read(tmp_path / "small")
    assert again == study
    assert back["x"] == failed
    for run, original in records.items():
        assert back[run].identity == original.identity
        assert back[run].settings == original.settings
        assert back[run].facts == pytest.approx(original.facts)
        assert len(back[run].rows) == len(original.rows)
        assert back[run].rows[-1] == pytest.approx(original.rows[-1])


def test_a_folder_of_neither_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no study"):
        read(tmp_path)


def test_a_tiny_study_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    command = ["queue", "tiny-digits", "--here", "--no-progress"]
    command += ["--runs", str(runs), "--results", str(results)]
    # Out of time at once; then all of it; then nothing is left to do.
    assert main([*command, "--minutes", "0"]) == 3
    assert "time is over" in capsys.readouterr().err
    assert main(command) == 0
    assert len(list((runs / "tiny-digits").glob("*/result.json"))) == 10
    text = capsys.readouterr().out
    assert "dbp against adam" in text
    made = {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.csv")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.csv")} == made
    page = (results / "tiny-digits" / "report.md").read_text()
    assert main(["report", str(results / "tiny-digits")]) == 0
    assert (results / "tiny-digits" / "report.md").read_text() == page
    # The control trains as its method does without DBP: as the baseline with the same settings.
    _, records = read(results / "tiny-digits")
    final: dict[str, Any] = {
        r.identity["method"]: r for r in records.values() if r.identity["seed"] == 10
    }
    assert final["dbp"].rows[-1]["decorrelation_loss"] > 0
    assert math.isnan(final["matched-adam"].rows[-1]["decorrelation_loss"])
