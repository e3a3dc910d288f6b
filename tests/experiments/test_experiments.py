"""experiments/: data parsing, the rules of the report on made-up curves, and the command line."""

from __future__ import annotations

import csv
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import report as rules
from experiments.__main__ import config_from, main, parser, sample, seeds
from experiments.configs import PRESETS, Config, Setting
from experiments.data import load
from experiments.loop import Row, Trainer
from experiments.plots import plot_report
from experiments.results import COLUMNS, ResultsDirectory, Run, group_runs, read_rows
from experiments.runner import write_report

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pyarrow = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


BP = Setting("bp", 1e-3)
DBP = Setting("dbp", 1e-3, 1e-3)


# --- rules of the report ------------------------------------------------------------------------


def made_up_run(
    setting: Setting,
    seed: int,
    test: list[float],
    *,
    validation: list[float] | None = None,
    epoch_seconds: float = 1.0,
    validation_loss: float = 1.0,
) -> Run:
    """A run with the given test accuracies; validation accuracy equals them unless given."""
    validation = validation or test
    rows = [
        Row(
            setting.method,
            setting.lr,
            setting.decor_lr,
            seed,
            epoch,
            train_loss=1 / epoch,
            train_accuracy=0.5,
            validation_loss=validation_loss,
            validation_accuracy=validation[epoch - 1],
            test_loss=1.0,
            test_accuracy=accuracy,
            epoch_seconds=epoch_seconds,
            seconds=epoch * epoch_seconds,
            decorrelation_loss=None,
        )
        for epoch, accuracy in enumerate(test, start=1)
    ]
    return Run(setting, seed, rows)


def test_crossings_are_the_first_ones_and_the_target_is_bps_best_mean() -> None:
    runs = [
        # Mean curve of BP: .5 .7 .9 .8: the target is .9, reached by seed 0 and 2 at epoch 3.
        made_up_run(BP, 0, [0.5, 0.7, 0.9, 0.8]),
        made_up_run(BP, 1, [0.5, 0.7, 0.85, 0.8]),
        made_up_run(BP, 2, [0.5, 0.7, 0.95, 0.8]),
        # DBP: first crossings at epochs 2, 1 and never; 1.5 seconds an epoch.
        made_up_run(DBP, 0, [0.6, 0.9, 0.5, 0.95], epoch_seconds=1.5),
        made_up_run(DBP, 1, [0.92, 0.1, 0.1, 0.1], epoch_seconds=1.5),
        made_up_run(DBP, 2, [0.6, 0.6, 0.6, 0.89], epoch_seconds=1.5),
    ]
    report = rules.build_report(runs, epochs=4)
    assert report.target == pytest.approx(0.9)
    bp, dbp = report.chosen["bp"], report.chosen["dbp"]
    assert bp.reached == [(3, 3.0), (math.inf, math.inf), (3, 3.0)]
    assert dbp.reached == [(2, 3.0), (1, 1.5), (math.inf, math.inf)]
    assert (bp.epochs_to_target, bp.seconds_to_target) == (3, 3.0)
    assert (dbp.epochs_to_target, dbp.seconds_to_target) == (2, 3.0)
    assert (bp.seeds_reached, dbp.seeds_reached) == (2, 2)
    text = rules.terminal_text(report)
    # 33 % fewer epochs in the median, but only two of three seeds agree.
    assert "Epochs to target: a tie (median 2 epochs with DBP, 3 epochs with BP" in text
    assert "Seconds to target: a tie (median 3.00 s with DBP, 3.00 s with BP" in text
    assert "DBP is earlier in 2 of 3 seeds; 2 of 3 DBP seeds reach it" in text


@pytest.mark.parametrize(("late", "sentence"), [(1, "33% fewer with DBP"), (2, "a tie")])
def test_a_difference_needs_three_quarters_of_the_seeds(late: int, sentence: str) -> None:
    slow, fast = [0.1, 0.2, 0.9], [0.1, 0.9, 0.9]
    runs = [made_up_run(BP, seed, slow) for seed in range(5)]
    runs += [made_up_run(DBP, seed, slow if seed < late else fast) for seed in range(5)]
    text = rules.verdict(rules.build_report(runs, 3))[1]
    assert text.startswith(f"Epochs to target: {sentence}")
    assert f"earlier in {5 - late} of 5 seeds" in text


def test_the_whole_grid_is_summed_up() -> None:
    runs = [
        made_up_run(BP, 0, [0.1, 0.9, 0.9]),
        made_up_run(Setting("bp", 1e-2), 0, [0.1, 0.2, 0.8], validation=[0.1] * 3),
        made_up_run(DBP, 0, [0.95, 0.1, 0.1]),
        made_up_run(Setting("dbp", 1e-3, 3e-3), 0, [0.1, 0.1, 0.95], epoch_seconds=0.5),
    ]
    text = rules.terminal_text(rules.build_report(runs, 3))
    assert "BP reaches it with 1 of 2, in 2 to 2 epochs and 2.00 to 2.00 s" in text
    assert "DBP reaches it with 2 of 2, in 1 to 3 epochs and 1.00 to 1.50 s" in text


@pytest.mark.parametrize(
    ("epoch_seconds", "sentence"),
    [
        (0.5, "Seconds to target: 50% fewer with DBP"),
        (0.95, "Seconds to target: a tie"),
        (1.05, "Seconds to target: a tie"),
        (1.5, "Seconds to target: 50% more with DBP"),
    ],
)
def test_verdict_in_seconds(epoch_seconds: float, sentence: str) -> None:
    runs = [
        made_up_run(BP, 0, [0.5, 0.9]),
        made_up_run(DBP, 0, [0.5, 0.9], epoch_seconds=epoch_seconds),
    ]
    assert sentence in "\n".join(rules.verdict(rules.build_report(runs, 2)))


def test_not_reached_is_said() -> None:
    runs = [made_up_run(BP, 0, [0.5, 0.9]), made_up_run(DBP, 0, [0.5, 0.89])]
    report = rules.build_report(runs, 2)
    text = "\n".join(rules.verdict(report))
    assert "Seconds to target: DBP's median run does not reach it (0 of 1 DBP seeds" in text
    assert any("not reached" in cell for cell in rules.summary_table(report)[1])


def test_learning_rate_is_chosen_on_validation_and_never_on_test() -> None:
    good, better_on_test = Setting("bp", 1e-3), Setting("bp", 1e-2)
    runs = [
        made_up_run(good, 0, [0.5, 0.6], validation=[0.5, 0.9]),
        made_up_run(better_on_test, 0, [0.5, 0.99], validation=[0.5, 0.8]),
    ]
    report = rules.build_report(runs, 2)
    assert report.chosen["bp"].setting == good
    assert report.target == pytest.approx(0.6)
    # Equal validation accuracies: the lower validation loss decides.
    runs = [
        made_up_run(good, 0, [0.5, 0.6], validation_loss=0.5),
        made_up_run(better_on_test, 0, [0.5, 0.6], validation_loss=0.4),
    ]
    assert rules.build_report(runs, 2).chosen["bp"].setting == better_on_test


def test_every_setting_and_every_seed_is_in_the_tables() -> None:
    settings = [BP, Setting("bp", 1e-2), DBP, Setting("dbp", 1e-3, 3e-3)]
    runs = [made_up_run(s, seed, [0.5, 0.6 + 0.1 * seed]) for s in settings for seed in (0, 1, 2)]
    report = rules.build_report(runs, 2)
    assert len(rules.summary_table(report)) == 4
    assert len(rules.run_table(report)) == 12
    # Mean and sample deviation of 60, 70, 80 %.
    assert rules.summary_table(report)[0][5] == "70.00 ± 10.00"


def test_unfinished_and_diverged_runs() -> None:
    runs = [
        made_up_run(BP, 0, [0.5, 0.9]),
        made_up_run(BP, 1, [0.99]),
        made_up_run(DBP, 0, [0.1, 0.1], validation_loss=math.nan),
    ]
    report = rules.build_report(runs, 2)
    assert report.target == pytest.approx(0.9)
    assert [run.seed for run in report.unfinished] == [1]
    assert "1 unfinished" in rules.terminal_text(report)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e30])
def test_diverged_losses_stay_readable(loss: float, tmp_path: Path) -> None:
    runs = [made_up_run(BP, 0, [0.5, 0.9]), made_up_run(DBP, 0, [0.1, 0.1])]
    runs[1].rows[1] = replace(runs[1].rows[1], train_loss=loss)
    report = rules.build_report(runs, 2)
    assert f"{loss:.2g}" in rules.summary_table(report)[1]
    plot_report(report, tmp_path / "curves.png", "made up")


def test_one_method_alone_or_nothing_makes_no_comparison() -> None:
    alone = rules.build_report([made_up_run(BP, 0, [0.5])], 1)
    assert "No comparison" in rules.terminal_text(alone)
    assert "No comparison" in rules.terminal_text(rules.build_report([], 1))


def test_accuracy_verdict_needs_more_than_the_spread() -> None:
    def sentence(offsets: list[float]) -> str:
        runs = [made_up_run(BP, s, [0.80 + o]) for s, o in enumerate((-0.01, 0, 0.01))]
        runs += [made_up_run(DBP, s, [0.80 + o]) for s, o in enumerate(offsets)]
        return rules.verdict(rules.build_report(runs, 1))[-1]

    assert "a tie" in sentence([0.0, 0.01, 0.02])
    assert "higher with DBP" in sentence([0.05, 0.06, 0.07])
    assert "lower with DBP" in sentence([-0.05, -0.06, -0.07])


# --- results directory ------------------------------------------------------------------------


def test_rows_survive_the_csv_and_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    run = made_up_run(DBP, 3, [0.1, 0.2, 0.3])
    out = tmp_path / "r"
    with ResultsDirectory(out, Config(epochs=3)) as results:
        for number, row in enumerate(run.rows, start=1):
            results.write(row)
            # Flushed at once: readable while the file is still open.
            assert len(read_rows(out / "metrics.csv")) == number
    assert group_runs(read_rows(out / "metrics.csv")) == [run]
    text = (out / "metrics.csv").read_text()
    (out / "metrics.csv").write_text(text[:-30])
    assert read_rows(out / "metrics.csv") == run.rows[:2]
    lines = text.splitlines()
    (out / "metrics.csv").write_text("\n".join([lines[0], lines[1][:-30], lines[2]]))
    with pytest.raises(ValueError, match="line 2"):
        read_rows(out / "metrics.csv")


def test_an_occupied_directory_is_refused_and_other_files_survive_overwriting(
    tmp_path: Path,
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        ResultsDirectory(tmp_path, Config())
    ResultsDirectory(tmp_path, Config(), overwrite=True).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_keeps_finished_runs_only_and_refuses_another_protocol(tmp_path: Path) -> None:
    config = Config(epochs=2)
    with ResultsDirectory(tmp_path / "r", config) as results:
        for run in (made_up_run(BP, 0, [0.1, 0.2]), made_up_run(DBP, 0, [0.1])):
            for row in run.rows:
                results.write(row)
    with pytest.raises(ValueError, match=r"kappa was 0\.5, now 0\.4"):
        ResultsDirectory(tmp_path / "r", Config(epochs=2, kappa=0.4), resume=True)
    assert len(read_rows(tmp_path / "r" / "metrics.csv")) == 3
    with ResultsDirectory(tmp_path / "r", Config(epochs=2, seeds=(0, 1)), resume=True) as results:
        assert results.finished == {(BP, 0)}
    assert len(read_rows(tmp_path / "r" / "metrics.csv")) == 2


# --- configuration and command line ---------------------------------------------------------------


def test_seeds_and_samples_are_lists_or_counts() -> None:
    assert seeds("0,2,5") == (0, 2, 5)
    assert seeds("3") == (0, 1, 2)
    assert seeds("3,") == (3,)
    assert sample("0.1") == 0.1
    assert isinstance(sample("1.0"), float)
    assert sample("6") == 6
    assert isinstance(sample("6"), int)


def test_options_go_before_the_preset_and_method_rates_before_common_ones() -> None:
    def config(*options: str) -> Config:
        return config_from(parser().parse_args(["train", *options]))

    both = config("--lr", "0.1,0.2", "--lr-dbp", "0.3")
    assert (both.lr_bp, both.lr_dbp) == ((0.1, 0.2), (0.3,))
    assert config("--preset", "demo", "--epochs", "2").epochs == 2
    assert config("--preset", "demo").epochs == PRESETS["demo"]["epochs"]
    assert config("--preset", "demo", "--lr", "0.1").lr_bp == (0.1,)
    with pytest.raises(ValueError, match=r"epochs.*got 0"):
        config("--epochs", "0")
    with pytest.raises(ValueError, match="methods"):
        config("--method", "sgd")
    with pytest.raises(ValueError, match="sample"):
        config("--sample", "1.5")


def test_demo_gives_bp_at_least_as_many_tries_and_several_seeds() -> None:
    config = Config(**PRESETS["demo"])
    tries = [setting.method for setting in config.settings()]
    assert tries.count("bp") >= tries.count("dbp") >= 2
    assert len(config.seeds) >= 3
    assert config.data == "digits"


def test_methods_take_turns() -> None:
    config = Config(lr_bp=(1.0, 2.0, 3.0), lr_dbp=(1.0,), decor_lr=(0.1, 0.2))
    order = [setting.method for setting in config.settings()]
    assert order == ["bp", "dbp", "bp", "dbp", "bp"]


def tiny(*options: str) -> list[str]:
    return [
        "train --model convnet --data digits --no-batch-norm --widths 4,4 --train-size 200",
        "--test-size 50 --validation-fraction 0.2 --epochs 2 --seeds 1 --no-progress",
        *options,
    ]


def run_cli(*options: str) -> int:
    return main(" ".join(tiny(*options)).split())


def test_cli_trains_both_methods_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_cli(f"--out {out}") == 0
    printed = capsys.readouterr().out
    assert "Seconds to target" in printed
    assert str(out / "curves.png") in printed
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [(r["method"], r["epoch"]) for r in rows] == [
        ("bp", "1"),
        ("bp", "2"),
        ("dbp", "1"),
        ("dbp", "2"),
    ]
    assert rows[0]["decorrelation_loss"] == ""
    assert float(rows[2]["decorrelation_loss"]) > 0
    assert float(rows[1]["seconds"]) > float(rows[1]["epoch_seconds"]) > 0
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((out / "config.json").read_text())
    assert document["config"]["epochs"] == 2
    assert document["environment"]["versions"]["torch"] == torch.__version__

    # A second run into the same place is refused and changes nothing.
    before = (out / "metrics.csv").read_text()
    assert run_cli(f"--out {out}") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "metrics.csv").read_text() == before

    # An interrupted run: the first one's lines stay as they are, the second starts again.
    lines = before.splitlines()
    (out / "metrics.csv").write_text("\n".join(lines[:4]) + "\n")
    assert run_cli(f"--out {out} --resume") == 0
    assert "1 of 2 runs are done" in capsys.readouterr().out
    after = (out / "metrics.csv").read_text().splitlines()
    assert after[:3] == lines[:3]
    assert len(after) == 5
    # The same seed on the same machine: the same losses.
    assert after[4].split(",")[5] == lines[4].split(",")[5]


def test_both_methods_start_from_the_same_weights_and_see_the_same_batches() -> None:
    config = Config(widths=(4, 4), batch_norm=False, batch_size=16)
    loaded = load("digits", train_size=100)
    bp, dbp = (Trainer(config, setting, 7, loaded) for setting in (BP, DBP))
    for name, parameter in bp.model.named_parameters():
        assert torch.equal(parameter, dict(dbp.model.named_parameters())[name])
    assert torch.equal(
        torch.randperm(100, generator=bp.order), torch.randperm(100, generator=dbp.order)
    )
    # The first step's loss is the same; R moves with it, so later ones are not.
    torch.manual_seed(0)
    first = [t.step(loaded.train.x[:16], loaded.train.y[:16])[0] for t in (bp, dbp)]
    torch.testing.assert_close(*first)
    assert any(
        name.endswith("R") and not torch.equal(value, torch.eye(len(value)))
        for name, value in dbp.model.state_dict().items()
    )


def test_report_rebuilds_and_says_when_there_is_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "config.json is missing" in capsys.readouterr().err
    with ResultsDirectory(tmp_path / "r", Config(epochs=2)) as results:
        for run in (made_up_run(BP, 0, [0.1, 0.2]), made_up_run(DBP, 0, [0.2, 0.3])):
            for row in run.rows:
                results.write(row)
    assert main(["report", str(tmp_path / "r")]) == 0
    summary = (tmp_path / "r" / "summary.md").read_text()
    assert "50% fewer with DBP" in summary
    assert "How this was decided" in summary
    assert write_report(tmp_path / "r") == capsys.readouterr().out.strip()


def test_cli_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run_cli(f"--out {out} --data mnist --data-dir {tmp_path / 'none'}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no train-*.parquet")
    assert error.count("\n") == 1
    assert not out.exists()
    if not torch.cuda.is_available():
        assert run_cli(f"--out {out} --device cuda") == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    original = Trainer.epoch
    calls = []

    def interrupted(self: Trainer) -> tuple[float, float, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "epoch", interrupted)
    assert run_cli(f"--out {out} --method bp") == 130
    assert "--resume" in capsys.readouterr().err
    assert len(read_rows(out / "metrics.csv")) == 1


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
