"""Studies: declaration, draws, choice by validation, and the plan of runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")

from experiments.choice import winners
from experiments.records import Record
from experiments.space import Dimension, draws
from experiments.study import FOLDER, PlannedRun, Study, load, merge, parse

TEXT = """
name: small
question: Does it?
base: {epochs: 2, optimizer: {name: sgd}}
space: {optimizer.lr: {log: [0.001, 1]}}
methods:
  plain: {baseline: true}
  adam: {baseline: true, set: {optimizer.name: adam}, space: {optimizer.lr: {log: [0.0001, 0.01]}}}
  decor: {space: {decor.lr: {log: [1.0e-5, 1.0e-2]}, decor.kappa: {choice: [0, 0.5]}}}
  matched: {settings_of: decor, set: {decor: null}}
trials: 4
tuning_seeds: [0]
final_seeds: [10, 11, 12]
"""


def test_values_of_a_dimension_stay_within_its_bounds() -> None:
    log = Dimension.parse("a", {"log": [1e-4, 1]})
    assert [log.at(u) for u in (0, 0.25, 0.5)] == [1e-4, 1e-3, 1e-2]
    assert Dimension.parse("a", {"linear": [-1, 3]}).at(0.25) == 0
    choice = Dimension.parse("a", {"choice": ["x", "y"]})
    assert [choice.at(u) for u in (0, 0.49, 0.5, 0.999)] == ["x", "x", "y", "y"]


@pytest.mark.parametrize(
    "declared",
    [
        {"log": [0, 1]},
        {"log": [2, 1]},
        {"linear": [1]},
        {"linear": ["a", "b"]},
        {"choice": []},
        {"uniform": [0, 1]},
        {"log": [1, 2], "linear": [1, 2]},
        [0, 1],
    ],
)
def test_a_space_that_makes_no_sense_is_refused_by_name(declared: Any) -> None:
    with pytest.raises(ValueError, match="space of optimizer"):
        Dimension.parse("optimizer.lr", declared)


def test_methods_share_the_places_on_common_axes_and_cover_them() -> None:
    lr, eps = Dimension("lr", "linear", (0, 1)), Dimension("eps", "linear", (0, 1))
    other = Dimension("lr", "linear", (10, 20))
    drawn = draws({"a": [lr], "b": [eps, other], "none": []}, 8, seed=0)
    assert [len(v) for v in drawn.values()] == [8, 8, 0]
    for a, b in zip(drawn["a"], drawn["b"], strict=True):
        assert b["lr"] == pytest.approx(10 + 10 * a["lr"], rel=5e-3)
    # of a Sobol sequence every eighth of each axis has one point
    for values in ([d["lr"] for d in drawn["a"]], [d["eps"] for d in drawn["b"]]):
        assert sorted(int(8 * v) for v in values) == list(range(8))
    assert draws({"a": [lr], "b": [eps, other], "none": []}, 8, seed=0) == drawn
    assert draws({"a": [lr], "b": [eps, other], "none": []}, 8, seed=1) != drawn


def test_merging_takes_away_what_a_change_replaces() -> None:
    config = {"decor.lr": 1e-3, "decor.kappa": 0.5, "epochs": 3}
    assert merge(config, {"decor": None}) == {"epochs": 3, "decor": None}
    assert merge({"decor": None}, {"decor.lr": 1.0}) == {"decor.lr": 1.0}
    assert merge({"decoration": 1}, {"decor": None}) == {"decoration": 1, "decor": None}


def test_every_method_has_the_same_number_of_trials_and_they_take_turns() -> None:
    study = parse(TEXT)
    runs = list(study.tuning_runs())
    assert Counter(run.method for run in runs) == {"plain": 4, "adam": 4, "decor": 4}
    assert [run.method for run in runs[:4]] == ["plain", "adam", "decor", "plain"]
    assert len({run.id for run in runs}) == len(runs)
    assert {run.seed for run in runs} == {0}
    adam = runs[1]
    assert adam.config["optimizer.name"] == "adam"
    assert 1e-4 <= adam.config["optimizer.lr"] <= 1e-2
    assert adam.config["seed"] == 0


def test_ids_are_the_same_for_the_same_configuration_only() -> None:
    first, again = (next(iter(parse(TEXT).tuning_runs())) for _ in range(2))
    assert first.id == again.id
    changed = next(iter(parse(TEXT.replace("epochs: 2", "epochs: 3")).tuning_runs()))
    assert changed.id != first.id
    assert changed.id.rsplit("-", 1)[0] == first.id.rsplit("-", 1)[0] == "tune-plain-t00-s0"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("trials: 4", "trials: 0", "trials must be at least 1"),
        ("trials: 4", "tries: 4", "unknown key 'tries'"),
        ("[10, 11, 12]", "[0, 11]", "must be fresh"),
        ("[10, 11, 12]", "[10, 10]", "named twice"),
        ("settings_of: decor", "settings_of: nobody", "names no method"),
        ("settings_of: decor", "settings_of: decor, baseline: true", "no baseline"),
        ("baseline: true", "baseline: false", "must be a baseline"),
        ("set: {optimizer.name: adam}", "set: {optimizer: {lr: 1}}", "both set and drawn"),
        ("set: {decor: null}", "sets: {}", "unknown key 'sets'"),
        ("tuning_seeds", "select: test\ntuning_seeds", "select must be"),
        ("name: small", "name: a/b", "a name must be"),
        ("name: small", "name: [", "not YAML"),
        ("trials: 4", "trials: 4\nwinners_from: other", "nothing is drawn"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ValueError, match=message):
        parse(TEXT.replace(old, new))


def test_a_study_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(FileNotFoundError, match="expected a file or one of"):
        load("nobody")


def record(
    planned: PlannedRun, scores: list[float], status: str = "finished", **more: float
) -> Record:
    """Made-up evaluations, one every 10 seconds."""
    rows = [
        {
            "epoch": e,
            "step": 5.0 * e,
            "examples": 50.0 * e,
            "seconds": 10.0 * e * more.get("slow", 1),
            "validation_score": score,
            "validation_loss": more.get("loss", 1 - score),
            "test_score": score - 0.01,
        }
        for e, score in enumerate(scores, start=1)
    ]
    identity = {n: getattr(planned, n) for n in ("group", "method", "phase", "trial", "seed")}
    return Record(planned.id, identity, planned.settings, status, rows)


def tuned(study: Study, curves: dict[str, list[Any]]) -> dict[str, Record]:
    """``curves``: by method, one curve (or finished record's arguments) for each trial."""
    records = {}
    for planned in study.tuning_runs():
        curve = curves[planned.method][planned.trial or 0]
        made = record(planned, **curve) if isinstance(curve, dict) else record(planned, curve)
        records[planned.id] = made
    return records


CURVES: dict[str, list[Any]] = {
    "plain": [[0.1, 0.2], [0.6, 0.5], [0.3, 0.55], {"scores": [0.9], "status": "diverged"}],
    "adam": [{"scores": [], "status": "failed"}] * 4,
    "decor": [[0.56, 0.3], [0.2, 0.7], {"scores": [0.2, 0.7], "loss": 0.1}, [0.1, 0.1]],
}


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("last", {"plain": 2, "decor": 2, "matched": 2}),
        ("best", {"plain": 1, "decor": 2, "matched": 2}),
        # the target is plain's best last score, 0.55
        ("earliest", {"plain": 1, "decor": 0, "matched": 0}),
    ],
)
def test_winners_are_chosen_by_validation(
    select: str, expected: dict[str, int], tmp_path: Path
) -> None:
    study = parse(TEXT + f"select: {select}\n")
    found = winners(study, tuned(study, CURVES), tmp_path)
    assert {method: winner.trial for (_, method), winner in found.items()} == expected
    # a control has its method's settings and what it changes, and nothing else
    matched, decor = found["", "matched"], found["", "decor"]
    assert matched.config == merge(decor.config, {"decor": None})
    assert "decor.lr" in decor.config
    assert matched.method == "decor"


def test_nothing_is_chosen_before_tuning_is_over(tmp_path: Path) -> None:
    study = parse(TEXT)
    records = tuned(study, CURVES)
    last = list(records)[-1]
    for status in ("unfinished", None):
        if status is None:
            del records[last]
        else:
            records[last] = Record(last, {}, {}, status, [])
        with pytest.raises(ValueError, match="tuning is not over"):
            winners(study, records, tmp_path)


def test_a_control_of_two_methods_follows_the_better(tmp_path: Path) -> None:
    study = parse(TEXT.replace("settings_of: decor", "settings_of: [plain, decor]"))
    curves: dict[str, list[Any]] = {**CURVES, "plain": [[0.1, 0.8]] * 4}
    assert winners(study, tuned(study, CURVES), tmp_path)["", "matched"].method == "decor"
    assert winners(study, tuned(study, curves), tmp_path)["", "matched"].method == "plain"


def test_final_runs_have_fresh_seeds_and_turns_of_their_own(tmp_path: Path) -> None:
    study = parse(TEXT)
    finals = list(study.final_runs(winners(study, tuned(study, CURVES), tmp_path)))
    assert [run.seed for run in finals] == [10] * 3 + [11] * 3 + [12] * 3
    assert [run.method for run in finals[::3]] == ["plain", "decor", "matched"]
    assert len({run.id for run in finals}) == 9
    matched = next(run for run in finals if run.method == "matched")
    assert matched.config["decor"] is None
    assert matched.config["seed"] == 10


def test_groups_are_tuned_by_themselves(tmp_path: Path) -> None:
    study = parse(TEXT + "groups: {wide: {model: {options.widths: [64]}}, deep: {}}\n")
    runs = list(study.tuning_runs())
    assert Counter(run.group for run in runs) == {"wide": 12, "deep": 12}
    wide, deep = runs[0], runs[3]
    assert wide.settings == deep.settings
    assert wide.config == {**deep.config, "model.options.widths": [64]}
    records = {r.id: record(r, [0.1 * (r.trial or 0) if r.group == "wide" else 0.5]) for r in runs}
    found = winners(study, records, tmp_path)
    assert found["wide", "plain"].trial == 3
    assert found["deep", "plain"].trial == 0


def test_settings_may_come_from_another_study(tmp_path: Path) -> None:
    from experiments.records import write_tables

    study = parse(TEXT)
    write_tables(tmp_path / "small", study, tuned(study, CURVES))
    text = """
name: large
base: {epochs: 5}
methods: {plain: {baseline: true}, decor: {}, matched: {settings_of: decor, set: {decor: null}}}
final_seeds: [1]
winners_from: small
"""
    larger = parse(text)
    assert list(larger.tuning_runs()) == []
    found = winners(larger, {}, tmp_path / "large")
    source = winners(study, tuned(study, CURVES), tmp_path)
    assert found["", "decor"].config == {"epochs": 5, **source["", "decor"].settings}
    assert found["", "matched"].config == merge(found["", "decor"].config, {"decor": None})
    with pytest.raises(ValueError, match="tuned small"):
        winners(parse(text.replace("[1]", "[0]")), {}, tmp_path / "large")
    with pytest.raises(ValueError, match="takes its settings from missing"):
        winners(parse(text.replace("from: small", "from: missing")), {}, tmp_path / "large")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_declared_studies_are_sound(path: Path) -> None:
    from experiments.queue import check

    study = load(path)
    assert study.name == path.stem
    assert study.question
    check(study)
    json.dumps([run.config for run in study.tuning_runs()])


@pytest.mark.parametrize(
    ("declared", "value", "edge"),
    [
        ({"log": [1e-3, 1e-1]}, 1.2e-3, True),
        ({"log": [1e-3, 1e-1]}, 8e-2, True),
        ({"log": [1e-3, 1e-1]}, 2e-2, False),
        ({"linear": [0, 1]}, 0.05, True),
        ({"linear": [0, 1]}, 0.5, False),
        ({"choice": [1, 2]}, 1, False),
    ],
)
def test_at_edge(declared: dict[str, Any], value: float, edge: bool) -> None:
    assert Dimension.parse("optimizer.lr", declared).at_edge(value) is edge
