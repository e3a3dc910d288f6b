"""experiments/: its command line; and the programs in examples/, which train on the same digits."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from experiments.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["queue", "nobody"], "no study 'nobody': expected a file or one of"),
        (["report", "nowhere"], "nowhere holds no study"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


# --- examples -------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_example_train_digits_learns_and_fuses(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "train_digits.py"))
    assert names["accuracy"] > 0.95
    assert names["difference"] < 1e-4
    assert {type(m).__name__ for m in names["plain"]} >= {"Conv2d", "Linear"}
    assert capsys.readouterr().out.count("test accuracy") == 5


def test_example_second_moment_whitens() -> None:
    names = runpy.run_path(str(EXAMPLES / "second_moment.py"))
    torch.testing.assert_close(names["S"], names["unfolded"])
    assert names["off_diagonal"].abs().max() < 1e-3
    assert names["step"].isfinite().all()
