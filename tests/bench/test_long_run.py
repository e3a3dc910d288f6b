"""Long runs: the command notices what grows; the committed one has nothing that does."""

import json
from pathlib import Path

import pytest

from bench import cli
from bench.suites import long_run

RESULT = Path(__file__).parents[2] / "bench" / "results" / "epyc-long-run.json"


def record(**last: float) -> dict:
    """Of windows that are alike, but for the last half."""
    window = {"steps": 10, "us": 100.0, "tensors": 5, "objects": 1000, "mib": 300.0}
    cold = {**window, "us": 300.0, "mib": 250.0}
    return {"name": "toy", "windows": [cold] + 4 * [window] + 4 * [{**window, **last}]}


def test_constant_is_fine_whatever_the_first_window_did():
    assert long_run.grows(record()) == []
    assert long_run.grows(record(us=80.0, tensors=4, objects=900, mib=200.0)) == []


@pytest.mark.parametrize(
    "last", [{"us": 130.0}, {"tensors": 6}, {"objects": 1300}, {"mib": 305.0}], ids=str
)
def test_what_grows_is_named(last):
    (found,) = long_run.grows(record(**last))
    assert found.startswith("slower" if "us" in last else next(iter(last)))


def test_one_tensor_a_step_is_noticed(monkeypatch):
    kept, real = [], long_run.F.mse_loss
    monkeypatch.setattr(long_run.F, "mse_loss", lambda *a: kept.append(real(*a)) or kept[-1])
    found = long_run.growth(long_run.measure("attach", 40, 4))
    assert found["tensors"] >= 10


def test_the_command_prints_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_run, "SLOWER", 100.0)  # so few steps tell nothing of time
    path = tmp_path / "long.json"
    assert cli.main(["long-run", "--steps", "60", "--save", str(path)]) == 0
    assert "nothing grows" in capsys.readouterr().out
    records = json.loads(path.read_text())["long_run"]
    assert [r["name"] for r in records] == list(long_run.FORMS)
    assert all(r["windows"][-1]["steps"] == 60 for r in records)
    assert cli.main(["long-run", "--save", str(path)]) == 2


def test_the_committed_run_is_long_and_constant():
    records = json.loads(RESULT.read_text())["long_run"]
    assert {r["name"] for r in records} == set(long_run.FORMS)
    for own in records:
        assert own["windows"][-1]["steps"] >= 20_000
        assert long_run.grows(own) == []
