"""``python -m bench precision``: what the update loses when tensor cores round its operands.

No GPU is needed: operands are rounded as tensor cores round them, products and sums are float32, as
theirs are (products of two rounded operands fit into float32, so that only the order of summation
differs). Every plan of the update has three products,

    gram      P = R S        M = P R^T        M' R
    direct    X = Z R^T      M = X^T X / n    M' R
    samples   X = Z R^T      U = X R          X^T U

of which the first two, in plan "samples" the first, form <x x^T> = R S R^T. R starts at I and learns
in every variant beside float64 from the same samples: the same ones at every step ("fixed"), until
float64's loss has fallen to CONVERGED of its beginning, about where new ones at every step
("fresh") end in the noise of sampling. What counts is the decorrelation loss of a variant's R, by
float64 and the exact second moment, over that of the R which learnt in float64.

S has condition number ``cond``, eigenvalues in equal ratios, a random basis and a mean diagonal of
1. The step size is 0.5 / max(c ||M_0||, v max_i M_0ii), c and v the rule's weights of C and V: half
of the one at which a factor R is multiplied by could become negative.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from bench.core import machine
from bench.core.results import save
from bench.core.table import format_table, short
from dbp_kernels.planning.choice import PLANS
from dbp_kernels.rules import UpdateRule

BOUND = 1.1  # of float64's loss: what a precision may cost and still be a default
# The variants that DecorUpdate runs by default on CUDA. In plan "samples" both last products are
# M' R: X^T (X R).
DEFAULT = {"gram": "last tf32", "direct": "last tf32", "samples": "last two tf32"}
CONVERGED = 1e-4  # of the loss at R = I, what a fixed set of samples is learnt to
CONDITIONS = (1e2, 1e4, 1e6)
REGIMES = ("fixed", "fresh")
_LONGEST = 3000  # steps
_FRESH_STEPS = 600  # the losses of the second half count

Product = Callable[[Tensor, Tensor], Tensor]


# ------------------------------------------------------------------------------ rounding


def tf32(x: Tensor) -> Tensor:
    """float32 to the nearest number of 10 mantissa bits, ties away from zero (cvt.rna.tf32.f32)."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_cut(x: Tensor) -> Tensor:
    """float32 without its low 13 bits: what tensor cores do to operands nobody has rounded."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    """float32 to the nearest number of 7 mantissa bits, ties to even."""
    return x.bfloat16().float()


def _of_rounded(rounded: Callable[[Tensor], Tensor]) -> Product:
    return lambda X, Y: rounded(X) @ rounded(Y)


def _in_three_terms(X: Tensor, Y: Tensor) -> Tensor:
    """Operands as sums of two tf32 numbers; all products but that of their small parts."""
    x, y = tf32(X), tf32(Y)
    return x @ y + (x @ tf32(Y - y) + tf32(X - x) @ y)


PRODUCTS: dict[str, Product] = {
    "float32": torch.matmul,
    "tf32": _of_rounded(tf32),
    "tf32 cut": _of_rounded(tf32_cut),
    "bf16": _of_rounded(bf16),
    "tf32x3": _in_three_terms,
}


# What runs in which precision: S = Z^T Z (plan "gram" has it), then the plan's three products.
_F, _T, _CUT = "float32", "tf32", "tf32 cut"
VARIANTS: dict[str, tuple[str, str, str, str]] = {
    "all float32": (_F, _F, _F, _F),
    "last tf32": (_F, _F, _F, _T),
    "last tf32 cut": (_F, _F, _F, _CUT),
    "last bf16": (_F, _F, _F, "bf16"),
    "last two tf32": (_F, _F, _T, _T),
    "last two tf32 cut": (_F, _F, _CUT, _CUT),
    "S tf32": (_T, _F, _F, _F),
    "all tf32": (_T, _T, _T, _T),
    "all tf32 cut": (_CUT, _CUT, _CUT, _CUT),
    "all tf32x3": ("tf32x3",) * 4,
    "all but last bf16": ("bf16", "bf16", "bf16", _F),
}


# ------------------------------------------------------------------------------ one update


def update(
    plan: str, Z: Tensor, R: Tensor, lr: Tensor, weights: UpdateRule, products: Sequence[Product]
) -> Tensor:
    """R after one update from samples Z (G, n, D) by a plan, as in ``plans.py``; lr (G, 1, 1).

    ``products`` are those of S = Z^T Z and of the plan. Not for kappa = 1, which has no C.
    """
    of_samples, first, second, last = products
    n, c = Z.shape[1], weights.c_weight
    if plan == "samples":
        X = first(Z, R.mT)
        moment = X.square().mean(1).unsqueeze(-1)
        d = weights.v_weight * (moment - 1) - c * moment
        return R - lr * (d * R + last(X.mT, second(X, R)) * (c / n))
    if plan == "gram":
        M = second(first(R, of_samples(Z.mT, Z) / n), R.mT)
    else:
        X = first(Z, R.mT)
        M = second(X.mT, X) / n
    diagonal = M.diagonal(dim1=1, dim2=2)
    diagonal.copy_((diagonal - 1) * (weights.v_weight / c))
    return R - lr * c * last(M, R)


def loss(R: Tensor, S: Tensor, weights: UpdateRule) -> Tensor:
    """The decorrelation loss (G,) of R for patches of second moment S, float64."""
    R = R.double()
    M = R @ S @ R.mT
    diagonal = M.diagonal(dim1=1, dim2=2)
    off = M.square().sum((1, 2)) - diagonal.square().sum(1)
    v = (diagonal - 1).square().sum(1)
    return (weights.c_weight * off + weights.kappa * v) / weights.loss_scale


# ------------------------------------------------------------------------------ one case


@dataclass(frozen=True)
class Case:
    """A layer of D inputs and how it learns; ``seeds`` of them side by side."""

    plan: str
    regime: str
    dim: int
    cond: float
    kappa: float
    rule: str = "standard"
    seeds: int = 3

    @property
    def samples(self) -> int:
        """n: few for plan "samples", which is for n <= D, yet of full rank where they stay."""
        if self.plan != "samples":
            return 2 * self.dim
        return self.dim if self.regime == "fixed" else self.dim // 2


def _second_moments(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """S (G, D, D) and its root, float64."""
    shape = (case.seeds, case.dim, case.dim)
    basis = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -math.log10(case.cond), case.dim, dtype=torch.float64)
    values *= case.dim / values.sum()
    return (basis * values) @ basis.mT, (basis * values.sqrt()) @ basis.mT


def _batches(case: Case, root: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The samples of each step, (G, n, D) of float32 numbers."""
    shape = (case.seeds, case.samples, case.dim)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.regime == "fixed":
        white = torch.linalg.qr(noise)[0] * math.sqrt(case.samples)  # white^T white / n = I
        Z = (white @ root).float()
        while True:
            yield Z
    while True:
        yield (noise @ root).float()
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)


def _step_size(case: Case, Z: Tensor, weights: UpdateRule) -> Tensor:
    """(G, 1, 1); see the module's text."""
    M = Z.double().mT @ Z.double() / case.samples
    by_C = weights.c_weight * torch.linalg.matrix_norm(M, 2)
    by_V = weights.v_weight * M.diagonal(dim1=1, dim2=2).amax(1)
    return (0.5 / torch.maximum(by_C, by_V)).view(-1, 1, 1)


def run_case(case: Case, variants: Sequence[str] = tuple(VARIANTS), seed: int = 0) -> dict:
    """The case's record: for each variant the loss over float64's, and how far its R is.

    "ratio": fixed samples: the greatest at any step; fresh ones: of the mean losses of the second
    half. "distance": of R at the end, relative. Both the worst of the seeds; None: not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    S, root = _second_moments(case, generator)
    weights = UpdateRule.make(case.rule, case.kappa, case.dim)
    batches = _batches(case, root, generator)
    Z = next(batches)
    lr = _step_size(case, Z, weights)
    if case.regime == "fixed":
        S = Z.double().mT @ Z.double() / case.samples  # of the float32 numbers, exactly
    exact = torch.eye(case.dim, dtype=torch.float64).expand_as(S)
    own = {name: exact.float() for name in variants if case.plan == "gram" or name != "S tf32"}
    begin = loss(exact, S, weights)
    worst = {name: torch.ones_like(begin) for name in own}
    sums = {name: torch.zeros_like(begin) for name in (*own, "")}
    longest = _LONGEST if case.regime == "fixed" else _FRESH_STEPS
    for step in range(1, longest + 1):
        learning = loss(exact, S, weights) > CONVERGED * begin  # some seeds are ready before others
        exact = update(case.plan, Z.double(), exact, lr, weights, [torch.matmul] * 4)
        true = loss(exact, S, weights)
        counted = 2 * step > longest
        sums[""] += counted * true
        for name in own:
            products = [PRODUCTS[precision] for precision in VARIANTS[name]]
            own[name] = update(case.plan, Z, own[name], lr.float(), weights, products)
            found = loss(own[name], S, weights)
            ratio = torch.where(learning, found / true, 1.0)
            worst[name] = torch.maximum(worst[name], ratio)  # a NaN stays
            sums[name] += counted * found
        if case.regime == "fixed" and not bool((true > CONVERGED * begin).any()):
            break
        Z = next(batches)
    if case.regime == "fresh":
        worst = {name: sums[name] / sums[""] for name in own}
    scale = torch.linalg.matrix_norm(exact)
    return {
        **asdict(case),
        "n": case.samples,
        "lr": _figure(lr.mean()),
        "steps": step,
        "loss": _figure((true / begin).max()),  # float64's at the end, over that at the beginning
        "variants": {
            name: {
                "ratio": _figure(worst[name].max()),
                "distance": _figure((torch.linalg.matrix_norm(R - exact) / scale).max()),
            }
            for name, R in own.items()
        },
    }


def _figure(x: Tensor) -> float | None:
    return float(f"{x.item():.4g}") if x.isfinite() else None


def cases(quick: bool = False) -> Iterator[Case]:
    """All that is run; ``quick``: one small layer of each plan."""
    for plan in PLANS:
        for cond in CONDITIONS:
            if quick:
                yield Case(plan, "fixed", 16, cond, 0.5, seeds=1)
                continue
            for regime in REGIMES:
                for kappa in (0.0, 0.5, 0.9):
                    yield Case(plan, regime, 64, cond, kappa)
                # its C weighs 1 / (D - 1): many steps
                yield Case(plan, regime, 16, cond, 0.5, "normalized")
            yield Case(plan, "fixed", 256, cond, 0.5, seeds=2)


# ------------------------------------------------------------------------------ what comes of it


def worst_ratios(records: Sequence[dict], plan: str) -> dict[str, dict[float, float]]:
    """{variant: {cond: its greatest ratio in any case of the plan}}; inf where it did not learn."""
    found: dict[str, dict[float, float]] = {}
    for record in records:
        if record["plan"] != plan:
            continue
        for name, figures in record["variants"].items():
            ratio = math.inf if figures["ratio"] is None else figures["ratio"]
            row = found.setdefault(name, {})
            row[record["cond"]] = max(ratio, row.get(record["cond"], 0.0))
    return found


def within_bound(records: Sequence[dict], plan: str) -> dict[str, bool]:
    """{variant: whether its loss stays within BOUND of float64's at every condition number}."""
    rows = worst_ratios(records, plan)
    return {name: max(row.values()) <= BOUND for name, row in rows.items()}


def report(records: Sequence[dict]) -> str:
    """Tables of the worst ratios, one for each plan; "inf": R is not finite."""
    parts = []
    for plan in PLANS:
        rows, verdicts = worst_ratios(records, plan), within_bound(records, plan)
        table = [[f'plan "{plan}"', *(f"cond {cond:.0e}" for cond in CONDITIONS), f"<= {BOUND}"]]
        for name, row in rows.items():
            cells = [f"{row[cond]:.3f}" if row[cond] < 10 else short(row[cond]) for cond in row]
            table.append([name, *cells, "yes" if verdicts[name] else "no"])
        parts.append(format_table(table))
    return "\n\n".join(parts)


def plot(records: Sequence[dict], path: Path) -> None:
    """Worst ratio less 1 against the condition number, a panel for each plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    top, bottom = 1e2, 1e-5
    colours = {name.removesuffix(" cut"): None for name in VARIANTS}
    colours = {name: f"C{index}" for index, name in enumerate(colours)}
    figure, axes = plt.subplots(1, len(PLANS), figsize=(12, 4.6), sharey=True, layout="constrained")
    for axis, plan in zip(axes, PLANS):
        for name, row in worst_ratios(records, plan).items():
            excess = [min(max(row[cond] - 1, bottom), top) for cond in CONDITIONS]
            plain = name.removesuffix(" cut")
            axis.plot(
                CONDITIONS,
                excess,
                "o-" if plain == name else "x--",
                label=name,
                color=colours[plain],
                linewidth=3 if plain == DEFAULT[plan] else 1.2,
            )
        axis.axhline(BOUND - 1, color="black", linestyle=":")
        title = f'plan "{plan}", default: {DEFAULT[plan]}'
        axis.set(xscale="log", yscale="log", title=title, xlabel="condition of S")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"worst loss over float64's, less 1\n(cut at {bottom:g} and {top:g})")
    axes[0].text(CONDITIONS[0], (BOUND - 1) * 1.15, f"bound: {BOUND}", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""

    out = argparse.ArgumentParser(prog="python -m bench precision", description=__doc__)
    out.formatter_class = argparse.RawDescriptionHelpFormatter
    out.add_argument("--save", type=Path, metavar="FILE", help="write JSON, and a plot beside it")
    out.add_argument("--quick", action="store_true", help="small layers only: a smoke test")
    options = out.parse_args(arguments)
    if options.save is not None and options.save.exists():
        print(f"{options.save} exists and is not overwritten; name another", file=sys.stderr)
        return 2
    given = sys.argv[2:] if arguments is None else arguments
    result: dict = {
        "format": 1,
        "command": shlex.join(["python", "-m", "bench", "precision", *given]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe("cpu"),
        "settings": {"bound": BOUND, "converged": CONVERGED, "products": VARIANTS},
    }
    begin = time.perf_counter()
    result["cases"] = [run_case(case) for case in cases(options.quick)]
    result["took_seconds"] = round(time.perf_counter() - begin)
    print(report(result["cases"]))
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        save(result, options.save)
        plot(result["cases"], options.save.with_suffix(".png"))
        print(f"\nsaved {options.save}, with a plot beside it")
    return 0
