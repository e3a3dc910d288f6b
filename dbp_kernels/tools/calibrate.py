"""``python -m dbp_kernels calibrate``: measures what the planner knows of a device, as a JSON file.

Every figure of ``dbp_kernels.planning.calibration.Machine`` comes from the operation it stands for, run by
itself on a few sizes. The file says where and how it was measured. It is used where DBP_CALIBRATION names
it; in a clone it goes to the package's own calibrations, which serve that device and similar ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dbp_kernels import version
from dbp_kernels.planning import calibration
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.planning.layout import make_program, shift_layout
from dbp_kernels.precision import matmul_precision, products_in
from dbp_kernels.tools import origin
from dbp_kernels.tools.arguments import device, positive
from dbp_kernels.tools.timing import cpu_time, threads, time_once

Content = dict[str, Any]
FOLDER = Path(calibration.__file__).parent / "calibrations"  # of the package
# Result sides of products: the narrow ones matter most.
SIDES = (1, 3, 8, 16, 21, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
GROUPS, GROUPED_SIDES = 32, (1, 4, 12, 16, 36, 64)
NARROW_DIM, NARROW = 1536, (4, 16, 32, 64, 128, 256, 512, 1536)
WGRAD_CHANNELS = (4, 16, 64, 256)
# Channels and size of maps to pack: usual ones, few channels, a network's first layer, and sizes of
# powers of two; and about how many elements the copy has.
_MAPS = ((64, 56), (128, 28), (256, 14))
_THIN_MAPS = ((4, 56), (4, 32))
_STEM_MAPS, _STEM = ((3, 224),), {"kernel": 7, "stride": 2}
_ALIASED_MAPS = ((64, 32), (128, 16), (256, 8))
_COPIED, _ALIASED_COPY = (500_000, 2_000_000, 8_000_000, 20_000_000), 3_000_000
_OPERATIONS, _PACKED = 6e8, 4e6  # of one product at most; buffers in use are no larger
_ELEMENTS = 2.4e7  # of a copy from and to memory


class Meter:
    """Times calls on a device: the best of some samples, each long enough to be measured."""

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device = device
        self.samples, self.shortest = (2, 1e-3) if quick else (3, 1e-2)
        self.passes = 1 if quick else 3  # apart in time: a busy moment spoils one of them at most
        self.shrink = 50 if quick else 1  # of the sizes

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        call()
        once = time_once(call, self.device)
        calls = max(1, math.ceil(self.shortest / max(once, 1e-7)))
        return min(time_once(call, self.device, calls) for _ in range(self.samples))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device)


def figures(
    meter: Meter, keep: Callable[[dict[str, Any]], object] = lambda found: None
) -> dict[str, Any]:
    """All figures of a device, as in its file: the best of some passes.

    ``keep`` is given what there is after every part. KeyboardInterrupt passes through.
    """
    measured: dict[str, Any] = {}
    for number in range(meter.passes):
        for name, part in parts(meter.device.type).items():
            if number == 0 or name not in GPU_PARTS:
                measured = {**measured, **_better(measured, part(meter))}
                keep(finished(measured))
    return finished(measured)


def finished(measured: dict[str, Any]) -> dict[str, Any]:
    """As in a file: rounded, and what is raw put in relation."""
    from dbp_kernels.planning.calibration import cost_at

    raw = measured.get("aliased")
    if raw:
        factors = [
            max(1.0, p[1] / cost_at(plain, p[0])) for [p], plain in zip(raw, measured["pack"])
        ]
        measured = {**measured, "aliased": factors}
    rounded: dict[str, Any] = _rounded(measured)
    return rounded


def parts(device_type: str) -> dict[str, Callable[[Meter], dict[str, Any]]]:
    """{name: what measures some figures, by themselves}."""
    gpu = GPU_PARTS if device_type == "cuda" else {}
    return {**PARTS, **gpu}


def part_figures(name: str, meter: Meter) -> dict[str, Any]:
    """The figures of one part, the best of some passes, as in a file."""
    part = parts(meter.device.type)[name]
    measured: dict[str, Any] = {}
    for _ in range(1 if name in GPU_PARTS else meter.passes):
        measured = _better(measured, part(meter))
    return finished(measured)


def _better(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Of each of b's figures the better one: rates up, costs down; a may lack some."""
    rates = ("product", "grouped", "narrow", "onednn", "wgrad", "gbytes")
    picks = {key: max if key in rates else min for key in b}
    return {key: _best_of(picks[key], a[key], b[key]) if key in a else b[key] for key in b}


def _best_of(pick: Callable[..., Any], a: Any, b: Any) -> Any:
    """Of each number in nested lists; the sizes of points are equal in both."""
    return [_best_of(pick, *pair) for pair in zip(a, b)] if isinstance(a, list) else pick(a, b)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _products(meter: Meter, groups: int, sides: Sequence[int]) -> list[Any]:
    """[side, GFLOP/s] of X^T Y between rows of one buffer, as the shift form multiplies."""
    from dbp_kernels.products.matmul import product

    points = []
    for side in sides:
        rows = min(_OPERATIONS / (groups * side**2), _PACKED / (groups * side))
        rows = max(64, int(rows / meter.shrink))
        X = meter.random(groups, rows + 33, side)
        out = torch.zeros(groups, side, side, device=meter.device)
        seconds = meter.seconds(partial(product, X[:, :-33], X[:, 33:], out, accumulate=True))
        points.append([side, 2 * groups * rows * side**2 / seconds / 1e9])
    return points


def _narrow(meter: Meter, multiply: Callable[..., Any]) -> list[Any]:
    """[n, GFLOP/s] of R (D, D) times n columns, and of n rows times R."""
    dim = max(32, NARROW_DIM // meter.shrink)
    R = meter.random(dim, dim)
    points = []
    for n in (n for n in NARROW if n <= dim):
        Z = meter.random(n, dim)
        seconds = meter.seconds(partial(multiply, Z, R.mT))
        seconds += meter.seconds(partial(multiply, Z, R))
        points.append([n, 4 * n * dim**2 / seconds / 1e9])
    return points


def _libraries(meter: Meter) -> dict[str, Any]:
    """The same by BLAS, and by oneDNN where torch has it for float32."""
    from dbp_kernels.products import onednn

    measured = {"narrow": _narrow(meter, torch.mm)}
    if meter.device.type == "cpu" and onednn.available():
        measured["onednn"] = _narrow(meter, onednn.product)
    return measured


def _weight_gradients(meter: Meter) -> list[Any]:
    """[channels, GFLOP/s] of 5x5 weight gradients over as many positions as are summed at once."""
    from dbp_kernels.planning.layout import WGRAD_POSITIONS

    points: list[list[float]] = []
    for channels in WGRAD_CHANNELS:
        channels = max(2, channels // meter.shrink) if meter.shrink > 1 else channels
        images, size = max(1, WGRAD_POSITIONS // 32**2), 32
        left = meter.random(images, channels, size, size)
        right = meter.random(images, channels, size + 4, size + 4)
        weight = (channels, channels, 5, 5)
        seconds = meter.seconds(partial(torch.nn.grad.conv2d_weight, right, weight, left))
        if not points or channels > points[-1][0]:
            rate = 2 * 25 * channels**2 * images * size**2 / seconds / 1e9
            points.append([channels, rate])
    return points


def _small_weight_gradients(meter: Meter) -> float:
    """ns per weight element and convolution of S from weight gradients over next to no positions."""
    from dbp_kernels.backends.eager import self_wgrad
    from dbp_kernels.planning.layout import wgrad_convolutions

    x, geometry = _map(meter, 1, max(2, 64 // meter.shrink), 6)
    weights: int = geometry.channels**2 * math.prod(2 * a.kernel - 1 for a in geometry.axes)
    seconds = meter.seconds(lambda: self_wgrad.patch_gram_self_wgrad(x, geometry))
    return 1e9 * seconds / (wgrad_convolutions(geometry) * weights)


def _bandwidth(meter: Meter) -> float:
    """GB/s read and written by a large copy."""
    source = meter.random(int(_ELEMENTS / meter.shrink))
    target = torch.empty_like(source)
    return 8 * source.numel() / meter.seconds(lambda: target.copy_(source)) / 1e9


def _fresh(meter: Meter) -> float:
    """ns per element of writing to memory that is new from the system rather than used before."""
    elements = int(_ELEMENTS / meter.shrink)
    used = meter.random(elements)
    again = meter.seconds(lambda: used.fill_(1.0))
    new = meter.seconds(lambda: torch.empty_like(used).fill_(1.0))
    return max(1e-3, 1e9 * (new - again) / elements)


def _calls(meter: Meter) -> dict[str, Any]:
    """Seconds of calls on next to nothing."""
    from dbp_kernels.backends.eager import ops, shift, unfold
    from dbp_kernels.planning.choice import PLANS
    from dbp_kernels.planning.geometry import make_geometry
    from dbp_kernels.planning.planner import update_choices
    from dbp_kernels.rules import UpdateRule

    x, geometry = _map(meter, 1, 2, 6)
    layouts = [shift_layout(geometry, kind) for kind in _KINDS[:2]]
    programs = [make_program(layout.shifted) for layout in layouts]
    many, few = (sum(len(band.products) for band in program.bands) for program in programs)
    slow, fast = (
        meter.seconds(partial(shift.patch_gram_shift, x, geometry, kind)) for kind in _KINDS[:2]
    )
    product = max(1e-7, (slow - fast) / (many - few))

    z, R = meter.random(3, 4), torch.eye(4, device=meter.device)[None]
    linear, rule = make_geometry(z.shape, (), (), (), (), 1), UpdateRule.make("standard", 0.5, 4)
    plans = {
        choice.name: meter.seconds(partial(ops.decor_update, z, R, linear, rule, False, choice))
        for choice in update_choices(linear)
    }
    a = meter.random(8)
    return {
        "call": meter.seconds(lambda: a.add_(a)),
        "product_call": product,
        "shift_call": max(1e-7, fast - few * product),
        "unfold_call": meter.seconds(lambda: unfold.patch_gram_unfold(x, geometry)),
        "plan_call": [plans[name] for name in PLANS],
    }


_KINDS = ((False, False), (False, True), (True, False))  # unfolded: no axis, the last, another


def _three(meter: Meter, maps: Sequence[Any], copied: Sequence[int], **window: int) -> list[Any]:
    """Points of packing in each kind, of about so many elements; means over some maps."""
    return [
        [_point(partial(_packing, meter, kind, **window), maps, n) for n in copied]
        for kind in _KINDS
    ]


def _packs(meter: Meter) -> dict[str, Any]:
    """Packing usual maps, and, to be put in relation to it, those of powers of two."""
    return {
        "pack": _three(meter, _MAPS, _COPIED),
        "aliased": _three(meter, _ALIASED_MAPS, [_ALIASED_COPY]),
    }


def _patches(meter: Meter, **window: int) -> list[Any]:
    """Points of im2col."""
    return [_point(partial(_im2col, meter, **window), _MAPS, n) for n in _COPIED]


def _point(measure: Callable[..., Any], maps: Sequence[Any], copied: int) -> list[Any]:
    """[copied, the mean over some maps of what ``measure`` says of so large a copy]."""
    return [copied, _mean(measure(*shape, copied) for shape in maps)]


def _mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def _map(
    meter: Meter, images: int, channels: int, size: int, kernel: int = 3, stride: int = 1
) -> tuple[torch.Tensor, ConvGeometry]:
    """(x, the geometry of a convolution of it)."""
    from dbp_kernels.planning.geometry import make_geometry

    x = meter.random(max(1, images // meter.shrink), channels, size, size)
    window = ((kernel, kernel), (stride, stride), (kernel // 2,) * 2, (1, 1))
    return x, make_geometry(x.shape, *window, 1)


def _packing(
    meter: Meter, kind: tuple[bool, bool], channels: int, size: int, copied: int, **window: int
) -> float:
    """ns per element of packed buffers of about ``copied`` elements."""
    from dbp_kernels.backends.eager import shift

    _, one = _map(meter, 1, channels, size, **window)
    image = one.input_numel * shift_layout(one, kind).expansion
    x, geometry = _map(meter, max(1, round(copied / image)), channels, size, **window)
    layout = shift_layout(geometry, kind)
    elements: float = geometry.input_numel * layout.expansion
    return 1e9 * meter.seconds(lambda: shift.pack(x, geometry, kind, layout.widths)) / elements


def _im2col(meter: Meter, channels: int, size: int, copied: int, **window: int) -> float:
    """ns per element of the patches as rows, about ``copied`` elements of them."""
    from dbp_kernels.backends.eager import unfold

    _, one = _map(meter, 1, channels, size, **window)
    images = max(1, round(copied / (one.samples * one.dim)))
    x, geometry = _map(meter, images, channels, size, **window)
    elements: int = geometry.samples * geometry.dim
    return 1e9 * meter.seconds(lambda: unfold.rows(x, geometry)) / elements


def _assembling(meter: Meter, channels: int, size: int, kind: tuple[bool, bool]) -> float:
    """ns per element of S."""
    from dbp_kernels.backends.eager import shift

    _, geometry = _map(meter, 1, channels, size)
    layout = shift_layout(geometry, kind)
    program = make_program(layout.shifted)
    sources = meter.random(program.sources, 1, layout.side, layout.side)
    seconds = meter.seconds(lambda: shift._assemble(sources, program, geometry, kind))
    return 1e9 * seconds / geometry.dim**2


# --------------------------------------------------------------------------- GPUs; not run yet


def _tensor_cores(meter: Meter) -> dict[str, Any]:
    """GFLOP/s of a large product in each precision but ieee float32."""
    from dbp_kernels import backends

    dtypes = {"tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    rates = {name: _peak(meter, dtype) for name, dtype in dtypes.items()}
    if not backends.unusable("triton", "cuda"):
        rates["tf32x3"] = _three_products(meter)
    return {"tensor_cores": rates}


def _three_products(meter: Meter) -> float:
    """GFLOP/s of a large product as exact as float32's by our kernel."""
    from dbp_kernels.backends.triton.product import product

    side = 4608 // meter.shrink
    a = meter.random(1, side, side)
    with products_in("tf32x3"):
        return 2 * side**3 / meter.seconds(lambda: product(a, a)) / 1e9


def _peak(meter: Meter, dtype: torch.dtype) -> float:
    """GFLOP/s of a large product; of float32 in tf32."""
    side = 8192 // meter.shrink
    a = meter.random(side, side).to(dtype)
    with matmul_precision("high"):
        return 2 * side**3 / meter.seconds(lambda: a @ a) / 1e9


def _own_kernels(meter: Meter) -> dict[str, Any]:
    """What our kernels reach of the peaks: the shipped figures, as nothing here measures them well.

    Measured on an H100 by layers that wait for memory and launches, they made every choice worse than
    these do; with these and all else as measured, predictions were closer (0.19 against 0.23, median
    error of the logarithm over 51 layers).
    """
    shipped = json.loads((FOLDER / "cuda-default.json").read_text())["figures"]
    return {key: shipped[key] for key in ("kernels", "gather", "sm90")}


PARTS: dict[str, Callable[[Meter], dict[str, Any]]] = {
    "product": lambda meter: {"product": _products(meter, 1, SIDES)},
    "grouped": lambda meter: {"grouped": _products(meter, GROUPS, GROUPED_SIDES)},
    "narrow": _libraries,
    "wgrad": lambda meter: {"wgrad": _weight_gradients(meter)},
    "wgrad_weight": lambda meter: {"wgrad_weight": _small_weight_gradients(meter)},
    "gbytes": lambda meter: {"gbytes": _bandwidth(meter)},
    "fresh": lambda meter: {"fresh": _fresh(meter)},
    "call": _calls,
    "pack": _packs,
    "pack_strided": lambda meter: {"pack_strided": _three(meter, _MAPS, _COPIED, stride=2)},
    "pack_thin": lambda meter: {"pack_thin": _three(meter, _THIN_MAPS, _COPIED)},
    "pack_stem": lambda meter: {"pack_stem": _three(meter, _STEM_MAPS, _COPIED, **_STEM)},
    "im2col": lambda meter: {"im2col": _patches(meter)},
    "im2col_strided": lambda meter: {"im2col_strided": _patches(meter, stride=2)},
    "assemble": lambda meter: {
        "assemble": [_mean(_assembling(meter, *m, kind) for m in _MAPS) for kind in _KINDS]
    },
}
GPU_PARTS: dict[str, Callable[[Meter], dict[str, Any]]] = {
    "tensor_cores": _tensor_cores,  # peaks of other precisions
    "kernels": _own_kernels,  # fractions of them that our kernels reach
}


# --------------------------------------------------------------------------- the command


def header(device: torch.device, command: str, commit: str | None, dirty: bool | None) -> Content:
    """The content of a calibration file for this device, but for its figures.

    ``commit`` and ``dirty`` are of the code: None where it is not known.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kind, name, capability, threads = calibration.present(device.type)
    return {
        "device": name,
        "type": kind,
        "capability": capability,
        "threads": threads,
        "measured": True,
        "origin": {
            "command": command,
            "date": datetime.now(timezone.utc).date().isoformat(),
            "torch": torch.__version__,
            "version": version.__version__,
            "commit": commit,
            "dirty": dirty,
        },
    }


def file_name(content: Content) -> str:
    """E.g. amd-epyc-2-threads.json."""
    threads = f"-{content['threads']}-threads" if content["type"] == "cpu" else ""
    return f"{origin.slug(content['device'])}{threads}.json"


def to_text(content: Content) -> str:
    """JSON, one figure a line."""
    lines = []
    for key, value in content.items():
        if key == "figures":
            figures = ",\n  ".join(f'"{k}": {json.dumps(v)}' for k, v in value.items())
            lines.append(f'"figures": {{\n  {figures}\n }}')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU time, not wall-clock time: with --threads 1, on a machine that is not idle",
    )
    parser.add_argument(
        "--save",
        nargs="?",
        const="",
        default=None if origin.clone() else "",
        metavar="PATH",
        help="write the file; default path: <device>.json in the current folder, where it is written "
        "without --save too, or, in a clone, in dbp_kernels/planning/calibrations/",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, no figures")


def main(options: argparse.Namespace, command: str) -> int:
    """Runs the command, which files call ``command``; returns the exit status."""
    if options.cpu_time and (options.threads != 1 or options.device.type != "cpu"):
        print("--cpu-time is for --threads 1 on a CPU", file=sys.stderr)
        return 2
    root = origin.clone()
    with threads(options.threads), cpu_time(options.cpu_time):
        content = header(options.device, command, origin.commit(root), origin.dirty(root))
        return _calibrate(options, content)


def _calibrate(options: argparse.Namespace, content: Content) -> int:
    """Measures and writes; an interrupted calibration is kept once every figure is there."""
    folder = FOLDER if origin.clone() else Path.cwd()
    path = Path(options.save) if options.save else folder / file_name(content)
    if options.save is not None and path.exists() and not options.overwrite:
        print(f"{path} exists and is not overwritten without --overwrite", file=sys.stderr)
        return 2
    begin, needed = time.perf_counter(), len(parts(options.device.type))
    rounds, found = 0, {}

    def keep(measured: dict[str, Any]) -> None:
        nonlocal rounds
        rounds += 1
        found.update(measured)
        content["origin"]["took_seconds"] = round(time.perf_counter() - begin)
        content["figures"] = found
        save()

    def save() -> None:
        if options.save is not None and rounds >= needed:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(to_text(content))

    try:
        figures(Meter(options.device, options.quick), keep)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        save()  # it may have been interrupted itself
    if rounds < needed:
        print("not all figures were measured: nothing is saved", file=sys.stderr)
        return 1
    print(to_text(content), end="")
    if options.save is not None:
        print(f"saved {path}")
        if path.parent.resolve() != FOLDER:
            print(f"the planner uses it where {calibration.VARIABLE}={path.resolve()} is set")
    return 0
