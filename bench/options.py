"""The options of a measuring run of ``python -m bench``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.core.suite import DTYPES, QUICK_BATCH, QUICK_PAIRS
from bench.suites import RUN
from bench.suites.kernels import DEFAULT_PAIRS
from bench.suites.steps import COMPILE_MODES
from dbp_kernels.tools.arguments import device, positive

_EPILOG = """\
python -m bench report FILE [--plot PNG]   rebuilds tables and plot from a saved result
python -m bench report --adopt FILE        puts what a device check found into this clone
python -m bench check                      compares a quick run's ratios with the committed ones
python -m bench counters                   every kernel's instructions and memory traffic, simulated
python -m bench device-check               all that only a machine with a GPU can tell, in one run
python -m bench host-time                  what Python takes for one call, with every launch stubbed
python -m bench long-run                   whether memory and time of a step stay what they are
python -m bench precision                  what tensor cores' roundings would do to the update
"""


def parser() -> argparse.ArgumentParser:
    """Options of a measuring run."""
    out = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures dbp_kernels against its rivals; a wrong kernel gets no number.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument(
        "--suite",
        choices=(*RUN, "all"),
        default="kernels",
        help="kernels: patch_gram on layer shapes (default); update: DecorUpdate.step() of whole "
        "networks; step: whole training steps; accumulation: steps of several micro-steps; passes: "
        "forward and backward passes, and step() by itself; memory: the peak of a step; scaling: "
        "patch_gram against one size of a layer; regret: the planner's choices against the best it could choose; "
        "budget: shares of the step under budgets, on a CPU (all: without it)",
    )
    out.add_argument("--device", type=device, default=torch.device("cpu"), help="default: cpu")
    out.add_argument(
        "--filter", metavar="REGEX", help='on "name tags", e.g. "^3x3", resnet50, "64@56", convnet'
    )
    out.add_argument("--batch", type=positive, help="replaces every case's batch size")
    out.add_argument(
        "--pairs",
        type=positive,
        help=f"alternating rounds (default: kernels {DEFAULT_PAIRS}, steps 25 or 9 by network)",
    )
    out.add_argument(
        "--sample", type=float, default=0.1, help="fraction of the images (default: 0.1)"
    )
    out.add_argument(
        "--methods",
        metavar="NAMES",
        help="kernels suite: only these, separated by commas; beside dbp and its rivals there are "
        "single algorithms, e.g. cuda_sm90,cuda_shift,triton_shift",
    )
    out.add_argument(
        "--samplings",
        action="store_true",
        help="step suite: also samples of 100 %%, 10 %%, 1 %% with an update every 1, 4, 16 steps",
    )
    out.add_argument(
        "--faster",
        action="store_true",
        help='step suite: also with DecorUpdate(matmul_precision="medium") and with overlap()',
    )
    out.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=COMPILE_MODES,
        help="step suite: also under torch.compile; reduce-overhead: with CUDA graphs on a GPU",
    )
    out.add_argument(
        "--trace",
        type=Path,
        metavar="PATH",
        help="step and update suites: also a Chrome trace, to be opened in Perfetto",
    )
    out.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    out.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU time, not wall-clock time: with --threads 1, on a machine that is not idle",
    )
    out.add_argument("--dtype", choices=DTYPES, default="float32", help="steps: autocast to it")
    out.add_argument("--channels-last", action="store_true", help="memory format of the images")
    out.add_argument(
        "--matmul-precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="torch.set_float32_matmul_precision (default: highest)",
    )
    out.add_argument(
        "--quick",
        action="store_true",
        help=f"the core cases, batch {QUICK_BATCH} and {QUICK_PAIRS} rounds: a smoke test",
    )
    out.add_argument(
        "--save",
        nargs="?",
        const="",
        metavar="PATH",
        help="write the result (default path: bench/results/<device>-<commit>.json); "
        "an existing file is never overwritten",
    )
    return out


def inconsistency(options: argparse.Namespace) -> str | None:
    """What does not go together, as a sentence."""
    if options.suite not in ("kernels", "scaling", "regret") and options.dtype == "float64":
        return "--dtype float64 is for kernels, scaling and regret: steps autocast"
    if options.trace and options.suite not in ("step", "update"):
        return f"--trace is for step and update, not {options.suite}"
    more = options.samplings or options.faster or options.compile
    if more and options.suite not in ("step", "all"):
        return f"--samplings, --faster and --compile are for step, not {options.suite}"
    if options.methods and options.suite != "kernels":
        return f"--methods is for kernels, not {options.suite}"
    if not 0 < options.sample <= 1:
        return f"--sample must be in (0, 1], got {options.sample:g}"
    if options.cpu_time and (options.threads != 1 or options.device.type != "cpu"):
        return "--cpu-time is for --threads 1 on a CPU"
    if options.suite == "budget" and options.device.type != "cpu":
        return "--suite budget reads the host's clock: it is for --device cpu"
    return None
