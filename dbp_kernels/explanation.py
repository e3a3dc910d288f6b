"""``explain``: what the planner does with each layer of a model, what it costs, and the alternatives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbp_kernels.choose import gram_choices, update_choices
from dbp_kernels.optim.options import checked_options
from dbp_kernels.planning.choice import Choice
from dbp_kernels.planning.geometry import ConvGeometry
from dbp_kernels.precision import computed_dtype, update_precision
from dbp_kernels.sampling import sample_size
from dbp_kernels.surgery import check_model, decorrelated_class


@dataclass(frozen=True)
class LayerReport:
    """One layer: its geometry for the sampled images, the choices, and its plain training step.

    ``step_gflop`` is forward and backward of the plain layer over the whole batch.
    """

    name: str
    geometry: ConvGeometry
    plans: tuple[Choice, ...]
    algorithms: tuple[Choice, ...]
    step_gflop: float

    @property
    def plan(self) -> Choice:
        """The plan the update takes."""
        return self.plans[0]


@dataclass(frozen=True)
class Explanation:
    """The result of ``explain``; prints as a table."""

    layers: tuple[LayerReport, ...]
    sample: float | int
    update_every: int

    def __str__(self) -> str:
        header = ("layer", "D", "n", "plan", "GFLOP", "ms", "of step", "alternatives (ms)")
        rows = [header]
        total = sum(r.step_gflop for r in self.layers) or 1.0
        for r in self.layers:
            others = [*r.plans[1:], *(r.algorithms[1:] if r.plan.gram else ())]
            rows.append(
                (
                    r.name,
                    f"{r.geometry.dim}" + (f" x{r.geometry.groups}" * (r.geometry.groups > 1)),
                    f"{r.geometry.samples}",
                    f"{r.plan.name}: {r.plan.gram}" if r.plan.gram else r.plan.name,
                    f"{r.plan.gflop:.3g}",
                    f"{1e3 * r.plan.seconds:.2f}",
                    f"{r.plan.gflop / self.update_every / total:.1%}",
                    ", ".join(f"{_name(c)} {1e3 * c.seconds:.2f}" for c in others),
                )
            )
        update = sum(r.plan.gflop for r in self.layers)
        seconds = sum(r.plan.seconds for r in self.layers)
        share = update / self.update_every / total
        rows.append(
            ("all", "", "", "", f"{update:.3g}", f"{1e3 * seconds:.2f}", f"{share:.1%}", "")
        )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                c.ljust(w) if i in (0, 3, 7) else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths))
            )
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        note = (
            f"sample={self.sample}, update_every={self.update_every}. GFLOP and estimated ms of one "
            "update; its share of the operations of a plain training step of these layers."
        )
        return "\n".join([line.rstrip() for line in lines] + [note])


def _name(choice: Choice) -> str:
    return choice.name if choice.gram is None else f"{choice.name}: {choice.gram.name}"


def explain(
    model: nn.Module,
    input: Tensor | tuple[Any, ...] | dict[str, Any],
    sample: float | int = 0.1,
    update_every: int = 1,
) -> Explanation:
    """Which plan and algorithm each layer's update takes, its cost, and the alternatives' costs.

    Args:
        model: a model or one layer, plain or decorrelated.
        input: an example batch, or a tuple of the model's positional arguments, or a dict of its
            keyword arguments; one forward pass in eval mode, without gradients, tells the layers'
            input shapes. Nothing is changed.
        sample, update_every: as of ``DecorUpdate``.

    Describes one process: with several, each adds up its own second moments (plan "gram" always),
    whatever the table says. Every layer is described as updated alone, though ``step()`` updates
    small layers of equal shape together.

    Returns an object that prints as a table; estimated times come from the planner's cost model.
    Raises TypeError if ``model`` is no module, ValueError if ``sample`` or ``update_every`` is out of
    range, if the model runs no layer that can be decorrelated, or if one gets an empty batch.
    """
    check_model(model)
    options = checked_options({"sample": sample, "update_every": update_every})
    reports: list[LayerReport] = []
    with _reporting(model, options["sample"], reports), _evaluating(model), torch.no_grad():
        if isinstance(input, dict):
            model(**input)
        else:
            model(*(input if isinstance(input, tuple) else (input,)))
    if not reports:
        raise ValueError(
            f"model={type(model).__name__} ran no layer that can be decorrelated (Linear, Conv1d, "
            "Conv2d, Conv3d, ConvTranspose2d, Decorrelate)"
        )
    return Explanation(tuple(reports), **options)


@contextmanager
def _reporting(model: nn.Module, sample: float | int, reports: list[LayerReport]) -> Iterator[None]:
    """Adds a report for every layer that runs; no activation is kept."""
    handles = []
    for name, module in model.named_modules():
        if decorrelated_class(module) is not None:

            def hook(
                module: nn.Module,
                arguments: tuple[Any, ...],
                keywords: dict[str, Any],
                output: Tensor,
                name: str = name,
            ) -> None:
                input = arguments[0] if arguments else keywords["input"]
                reports.append(
                    _report(name or type(module).__name__, module, input, output, sample)
                )

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _report(
    name: str, module: nn.Module, input: Tensor, output: Tensor, sample: float | int
) -> LayerReport:
    cls = decorrelated_class(module)
    assert cls is not None  # other modules do not report
    layer = cls.__new__(cls)  # a plain layer as its decorrelated class sees it, nothing copied
    layer.__dict__ = module.__dict__
    images = layer._as_images(input)
    (seen,) = layer._op_inputs([images[: sample_size(sample, images.shape[0])]])
    geometry = seen.geometry
    if geometry.samples == 0:
        raise ValueError(
            f"input reaches layer {name!r} with shape {tuple(input.shape)}: expected a batch with at "
            "least one image"
        )
    if isinstance(module, nn.ConvTranspose2d):
        multiplied = input.numel() * math.prod(module.weight.shape[1:])
    else:
        multiplied = output.numel() * geometry.dim
    where = (geometry, input.device.type, computed_dtype(input))
    # multiply-adds count twice; forward, gradient of the input, gradient of the weight
    step_gflop = 6 * multiplied / 1e9
    with update_precision(None, input.is_cuda):  # as a DecorUpdate does
        plans, algorithms = update_choices(*where), gram_choices(*where)
    return LayerReport(name, geometry, plans, algorithms, step_gflop)
