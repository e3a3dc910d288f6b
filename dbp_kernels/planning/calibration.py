"""What the planner knows of a device: its rates, from JSON files in ``calibrations/``.

A file holds figures that ``python -m dbp_kernels calibrate`` measured on a device, or guesses, and says
which. A device takes its own file, or else that of the most similar device of its type. The
environment variable DBP_CALIBRATION names a file to take instead. Files are read when the planner is
first asked, and not again.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from dbp_kernels.loaded import is_int, is_number

Points = tuple[tuple[int, float], ...]
VARIABLE = "DBP_CALIBRATION"
TYPES = ("cpu", "cuda")
DEFAULT = "cuda-default.json"  # for GPUs of which nothing similar was measured


@dataclass(frozen=True)
class Machine:
    """The figures of a device. Rates are GFLOP/s of float32, costs ns per float32 element.

    Attributes:
        product: points (side, rate) of X^T Y with a long inner dimension, by the result's side.
        grouped: the same for several products in one batched call.
        narrow: points (n, rate) of a large square matrix times n columns, by BLAS.
        onednn: the same by oneDNN, float32 on CPUs. Empty where not measured, or not on this maker's
            processors.
        wgrad: points (channels of a group, rate) of weight-gradient convolutions.
        gbytes: copy bandwidth in GB/s, bytes read and written both counted.
        fresh: cost of writing a large result to new memory, beside memory used before.
        call: seconds of a small library call.
        product_call: seconds of one of the shift form's products of next to nothing.
        shift_call: seconds of the shift form around its products, on next to nothing.
        unfold_call: seconds of im2col and its product, on next to nothing.
        plan_call: seconds of an update of next to nothing by each of the planner's plans.
        pack: of a copy into rows of channels, where no axis, the last one, or another one is
            unfolded: points (elements of the copy, cost). Large copies go to new memory and reach
            over more pages than a CPU keeps track of: an element of them costs several times more.
        pack_strided: the same where the convolution has a stride.
        pack_thin: as ``pack`` for so few channels that they do not fill a cache line.
        pack_stem: as ``pack_thin``, with a stride (and the wide kernel that usually goes with it).
        aliased: factors on packing, cases as of ``pack``, where the channels of a pixel compete for
            few cache sets because the images' sizes are powers of two.
        im2col: of the patches as rows: points (their elements, cost).
        im2col_strided: the same where the convolution has a stride.
        assemble: cost of S from its blocks, by element of S; cases as of ``pack``.
        wgrad_weight: cost of weight-gradient convolutions around their operations, by element of
            the weights: of their results, and of adding up S from these. 0 where not measured.
        tensor_cores: peak rates that other operand precisions have in place of ieee float32's.
        kernels: points (padded side, fraction of the peak) of our own GPU kernels.
        sm90: the same of those for compute capability 9.0 only; as ``kernels`` where not known.
        gather: what gathering taps leaves of that rate.
        speed: rate of the operand precision over that of ieee float32.
    """

    product: Points
    grouped: Points
    narrow: Points
    wgrad: Points
    gbytes: float
    fresh: float
    call: float
    product_call: float
    shift_call: float
    unfold_call: float
    plan_call: tuple[float, float, float]
    pack: tuple[Points, Points, Points]
    pack_strided: tuple[Points, Points, Points]
    pack_thin: tuple[Points, Points, Points]
    pack_stem: tuple[Points, Points, Points]
    aliased: tuple[float, float, float]
    im2col: Points
    im2col_strided: Points
    assemble: tuple[float, float, float]
    wgrad_weight: float = 0.0
    onednn: Points = ()
    tensor_cores: tuple[tuple[str, float], ...] = ()
    kernels: Points = ()
    sm90: Points = ()
    gather: float = 1.0
    speed: float = 1.0

    @cached_property
    def onednn_pays(self) -> bool:
        """Whether oneDNN multiplies faster than BLAS by more than timing's noise, in the mean."""
        gains = [math.log(rate / interpolate(self.narrow, n)) for n, rate in self.onednn]
        return bool(gains) and sum(gains) / len(gains) > math.log(1.05)

    @property
    def peak(self) -> float:
        """The best product rate, operations per second."""
        return self.speed * 1e9 * max(rate for _, rate in self.product)

    def product_rate(self, side: int, groups: int = 1) -> float:
        """Operations per second of X^T Y with a long inner dimension and a side x side result."""
        table = self.product if groups == 1 else self.grouped
        return self.speed * 1e9 * interpolate(table, side)

    def narrow_rate(self, columns: int, blas: bool = False) -> float:
        """Operations per second of a large matrix times so many columns, by BLAS or what is faster."""
        table = self.onednn if self.onednn_pays and not blas else self.narrow
        return self.speed * 1e9 * interpolate(table, columns)

    def wgrad_rate(self, channels: int) -> float:
        """Operations per second of a weight-gradient convolution."""
        return self.speed * 1e9 * interpolate(self.wgrad, channels)

    def kernel_rate(self, side: int, sm90: bool = False) -> float:
        """Operations per second of our own GPU kernels, or of those for compute capability 9.0."""
        table = (sm90 and self.sm90) or self.kernels
        return self.peak * interpolate(table, side) if table else self.peak

    def bytes_per_second(self) -> float:
        """Copy bandwidth, bytes read and written both counted."""
        return self.gbytes * 1e9


@dataclass(frozen=True)
class Calibration:
    """A file's content: the figures, and where they come from.

    ``capability`` is the CPU's instruction set as torch names it, or a GPU's "major.minor".
    """

    source: str
    device: str
    type: str
    capability: str
    threads: int
    measured: bool
    machine: Machine

    @property
    def text(self) -> str:
        """One line for the environment report."""
        how = "measured" if self.measured else "GUESSED, not measured"
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.type == "cpu" else ""
        return f"{self.source}: {how} on {self.device}{threads}"


def interpolate(points: Points, x: float) -> float:
    """Piecewise linear in log2(x); constant above the last point, towards zero below the first."""
    if x <= points[0][0]:
        return points[0][1] * x / points[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * math.log2(x / x0) / math.log2(x1 / x0)
    return points[-1][1]


def cost_at(points: Points, elements: float) -> float:
    """A cost per element: piecewise linear in log2(elements), constant beyond either end."""
    within = min(max(elements, points[0][0]), points[-1][0])
    return interpolate(points, within)


@lru_cache
def machine(device_type: str, precision: str = "ieee", itemsize: int = 4) -> Machine:
    """The figures for "cuda", or the CPU's for any other device type, at an operand precision."""
    m = calibration("cuda" if device_type == "cuda" else "cpu").machine
    if itemsize == 8:
        return replace(m, speed=0.5, onednn=())
    special = dict(m.tensor_cores).get(precision)
    return replace(m, speed=special * 1e9 / m.peak) if special else m


@lru_cache
def calibration(device_type: str) -> Calibration:
    """The calibration in use for "cpu" or "cuda".

    Raises ValueError if the file that DBP_CALIBRATION names is not readable or not a calibration.
    """
    path = os.environ.get(VARIABLE)
    if path:
        given = read(Path(path), f"{VARIABLE}={path}")
        if given.type == device_type:
            return given
    return nearest(shipped(), *present(device_type))


def nearest(
    known: tuple[Calibration, ...], type: str, device: str, capability: str, threads: int
) -> Calibration:
    """The device's own calibration, else the most similar of its type, else the type's default.

    How libraries compare is taken from the same maker's processors only.

    Similar is: the same device with another number of threads, then a CPU of the same maker, then
    the same capability; among equals the nearest number of threads.
    """

    def distance(c: Calibration) -> tuple[Any, ...]:
        similar = c.capability == capability
        # a GPU of another generation tells less than the default does
        last = similar == (c.source == DEFAULT)
        other = type == "cpu" and _maker(c.device) != _maker(device)
        nearness = abs(math.log2(c.threads / threads)), c.source
        return c.device != device, other, not similar, last, *nearness

    found = min((c for c in known if c.type == type), key=distance)
    if _maker(found.device) != _maker(device):  # BLAS treats makers apart
        return replace(found, machine=replace(found.machine, onednn=()))
    return found


def _maker(device: str) -> str:
    return device.partition(" ")[0]


@lru_cache
def shipped() -> tuple[Calibration, ...]:
    """All calibrations that come with the package."""
    folder = files(__package__).joinpath("calibrations")
    paths = sorted((p for p in folder.iterdir() if p.name.endswith(".json")), key=lambda p: p.name)
    return tuple(read(path, path.name) for path in paths)


def present(device_type: str) -> tuple[str, str, str, int]:
    """(type, device, capability, threads) of this machine's CPU or current GPU."""
    if device_type == "cpu":
        return "cpu", cpu_name(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    if not torch.cuda.is_available():  # asked about a GPU from elsewhere
        return "cuda", "", "", 1
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return "cuda", torch.cuda.get_device_name(), capability, 1


@lru_cache
def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------ files


def read(path: Any, name: str) -> Calibration:
    """The calibration in a file, which errors call ``name``.

    Raises ValueError naming the key, for whatever is missing, has another type or is out of range.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected a calibration file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected a JSON object")
    kinds = {"device": str, "type": str, "capability": str, "threads": int, "measured": bool}
    values = {key: _value(content, key, kind, name) for key, kind in kinds.items()}
    if values["type"] not in TYPES:
        raise ValueError(f"{name}: type={values['type']!r}: expected 'cpu' or 'cuda'")
    if not 1 <= values["threads"] <= _MOST:
        raise ValueError(f"{name}: threads={values['threads']}: expected from 1 to {_MOST:g}")
    figures = _value(content, "figures", dict, name)
    parsers = {f.name: _PARSERS[f.name] for f in fields(Machine) if f.name in _PARSERS}
    unknown = figures.keys() - parsers.keys()
    if unknown:
        raise ValueError(f"{name}: figures.{min(unknown)}: no such figure")
    parsed: dict[str, Any] = {}
    for key, parser in parsers.items():
        if key not in figures and key in _OPTIONAL:
            continue
        if key not in figures:
            raise ValueError(f"{name}: figures.{key} is missing")
        try:
            parsed[key] = parser(figures[key])
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{name}: figures.{key}={figures[key]!r}: {error}") from None
    source = getattr(path, "name", name)
    return Calibration(source=str(source), machine=Machine(**parsed), **values)


def _value(content: dict[str, Any], key: str, kind: type, name: str) -> Any:
    value = content.get(key)
    if type(value) is not kind or (isinstance(value, str) and not value.isprintable()):
        raise ValueError(f"{name}: {key}={value!r}: expected {_KINDS[kind]}")
    return value


# Beyond these no figure is one, and times that follow from two of them stay finite and above 0.
_LEAST, _MOST = 1e-15, 1e15

_KINDS = {str: "a printable string", int: "an integer", bool: "true or false", dict: "an object"}


def _number(value: Any) -> float:
    if not is_number(value, _LEAST, _MOST):
        raise ValueError(f"expected a number from {_LEAST:g} to {_MOST:g}")
    return float(value)


def _points(value: Any) -> Points:
    pairs = [tuple(pair) for pair in value] if isinstance(value, list) else []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError("expected a list of pairs [size, number]")
    if any(not is_int(size, 1, int(_MOST)) for size, _ in pairs):
        raise ValueError(f"expected sizes from 1 to {_MOST:g}")
    points = tuple((size, _number(y)) for size, y in pairs)
    if any(a >= b for (a, _), (b, _) in itertools.pairwise(points)):
        raise ValueError("expected sizes in ascending order")
    return points


def _three(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("expected three numbers")
    return tuple(_number(v) for v in value)


def _three_tables(value: Any) -> tuple[Points, ...]:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError("expected three lists of pairs [size, number]")
    return tuple(_points(points) for points in value)


def _rates(value: Any) -> tuple[tuple[str, float], ...]:
    return tuple((str(key), _number(rate)) for key, rate in value.items())


_PARSERS = {
    "product": _points,
    "grouped": _points,
    "narrow": _points,
    "wgrad": _points,
    "gbytes": _number,
    "fresh": _number,
    "call": _number,
    "product_call": _number,
    "shift_call": _number,
    "unfold_call": _number,
    "plan_call": _three,
    "pack": _three_tables,
    "pack_strided": _three_tables,
    "pack_thin": _three_tables,
    "pack_stem": _three_tables,
    "aliased": _three,
    "im2col": _points,
    "im2col_strided": _points,
    "assemble": _three,
    "wgrad_weight": _number,
    "onednn": _points,
    "tensor_cores": _rates,
    "kernels": _points,
    "sm90": _points,
    "gather": _number,
}
_OPTIONAL = {"wgrad_weight", "onednn", "tensor_cores", "kernels", "sm90", "gather"}
