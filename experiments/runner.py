"""Runs the grid of a comparison, seed by seed with the methods taking turns, and reports."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from experiments.configs import Config
from experiments.data import load
from experiments.extras import need
from experiments.loop import Row, train_run, warm_up
from experiments.plots import plot_report
from experiments.report import build_report, markdown_text, terminal_text
from experiments.results import ResultsDirectory, group_runs, read_config, read_rows


def run_comparison(
    config: Config,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> str:
    """Trains all runs of ``config``, writes everything into ``out`` and returns the printed report.

    On KeyboardInterrupt the finished epochs stay on disk and the exception goes on.
    """
    tqdm = need("tqdm", "tqdm", "the progress bar").tqdm
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _device(config)
    data = load(
        config.data,
        config.data_dir,
        train_size=config.train_size,
        test_size=config.test_size,
        validation_fraction=config.validation_fraction,
    ).to(device, config.channels_last)
    settings = config.settings()
    grid = [(setting, seed) for seed in config.seeds for setting in settings]
    with ResultsDirectory(out, config, overwrite=overwrite, resume=resume) as results:
        todo = [point for point in grid if point not in results.finished]
        if len(todo) < len(grid):
            print(f"resuming: {len(grid) - len(todo)} of {len(grid)} runs are done already")
        # Once per method: the first calls of a process are slower than all later ones.
        for method in {setting.method: setting for setting, _ in todo}.values():
            warm_up(config, method, data)
        total = len(todo) * config.epochs
        with tqdm(total=total, unit="epoch", disable=not progress, file=sys.stderr) as bar:
            for setting, seed in todo:

                def on_row(row: Row, name: str = f"{setting.label()} seed {seed}") -> None:
                    results.write(row)
                    bar.set_description(name)
                    bar.set_postfix_str(f"test {row.test_accuracy:.2%}", refresh=False)
                    bar.update()

                train_run(config, setting, seed, data, on_row)
    return write_report(out)


def write_report(out: Path) -> str:
    """(Re)builds ``summary.md`` and ``curves.png`` in ``out``; returns the text to print."""
    config = read_config(out)
    report = build_report(group_runs(read_rows(out / "metrics.csv")), config.epochs)
    title = f"{config.model} on {config.data}: plain (BP) and decorrelated (DBP) backpropagation"
    details = (
        f"{config.epochs} epochs, batches of {config.batch_size}, Adam, "
        f"{'with' if config.batch_norm else 'without'} batch norm; DBP: kappa {config.kappa:g}, "
        f"sample {config.sample}, update every {config.update_every} step(s), rule {config.rule}. "
        "Exact settings and versions: config.json."
    )
    (out / "summary.md").write_text(markdown_text(report, title, details))
    text = terminal_text(report)
    if report.summaries:
        plot_report(report, out / "curves.png", title)
        text += f"\n\nPlot: {out / 'curves.png'}"
    return f"{text}\nTables: {out / 'summary.md'}\nEpochs: {out / 'metrics.csv'}"


def _device(config: Config) -> torch.device:
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"device must be like 'cpu' or 'cuda', got {config.device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no CUDA device; try --device cpu")
    return device
