"""Which layers a ``DecorUpdate`` with a budget updates at which step, and from how many images.

Pure Python, no tensors and no clock: the decisions follow from the costs, the losses and the step
alone, so equal states decide alike, in every process.

A budget is a share s of the training step's time. With B seconds for the step without any update,
the updates may take A = B s / (1 - s) seconds a step (``allowance``), which go into a bank. Costs
are planned, and may be measured before the steps in ``CALIBRATIONS``, the last time for good.

1. The first ``WARM_UP`` steps update every layer, as without a budget. They are not charged.
2. Samples become smaller before updates become rarer: one update moves R about as far whatever its
   sample, so while the layers do not all fit into A, the samples that cost most are halved, as long
   as that saves time (``fit_samples``).
3. Every step, the bank pays for the layers in the order of gain / cost x age (``choose``): gain is
   how far an update lowers the layer's loss, age the steps since its last one. Equal gains thus
   get equal time. The first layer that the bank cannot pay ends the step: the next ones save up
   for it. So a step costs at most A plus the dearest update, and no more than A on average.
4. No layer starves: one older than ``ROUNDS`` times the steps that updating all of them takes goes
   first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from dbp_kernels.loaded import StateError, is_int, is_number

WARM_UP = 5
CALIBRATIONS = (WARM_UP, 15, 45, 135)  # steps before which costs are set; the last ones stay
ROUNDS = 4
WINDOW = 8  # losses of single samples are noise: means of so many are compared
# GUESS: a layer whose loss is not seen to fall is taken to lose this fraction of it per update.
# Near R = I the update lowers a loss in proportion to itself.
_FALL = 0.01
_WORTH = 0.8  # halving a sample must bring its cost down to this fraction
_SWEEPS = 20
_OUTLIER = 3.0
# What costs and times may be in a state: sums, products and ratios of such do not overflow.
_MOST, _LEAST = 1e12, 1e-100
_SECONDS = f"seconds from 0 to {_MOST:g}"
_POSITIVE = f"a number from {_LEAST:g} to {_MOST:g}"

Sizes = tuple[tuple[float, float], ...]  # (part of the full sample, planned seconds), falling


def fit_costs(
    costs: Sequence[float], overhead: float, steps: Iterable[tuple[Sequence[int], float]]
) -> tuple[list[float], float]:
    """Costs and overhead that explain what steps took, starting from planned ones.

    Args:
        costs: seconds of one update of each layer.
        overhead: seconds of a step's update apart from its layers.
        steps: (layers updated, seconds that took) of every measured step.

    Multiplicative, by expectation maximisation: costs stay positive, their sum over the steps
    becomes what was measured, and a layer that no step updated keeps its cost. Where all steps
    updated the same layers, the overhead stays: they cannot tell it. A step of more than 3 times
    the time that the typical step's ratio predicts counts as 3 times.
    """
    fitted = [*costs, overhead]
    members = [([*layers, len(costs)], seconds) for layers, seconds in steps]
    if not members:
        return list(costs), overhead
    # a step of no layers is the overhead and nothing else
    told = len({tuple(who) for who, _ in members}) > 1 or any(len(who) == 1 for who, _ in members)

    def ratios() -> list[float]:
        predicted = [sum(fitted[i] for i in who) for who, _ in members]
        return [seconds / p if p else 1.0 for p, (_, seconds) in zip(predicted, members)]

    for _ in range(_SWEEPS):
        found = ratios()
        limit = _OUTLIER * statistics.median(found)
        sums, counts = [0.0] * len(fitted), [0] * len(fitted)
        for (who, _), ratio in zip(members, found):
            for i in who:
                sums[i] += min(ratio, limit)
                counts[i] += 1
        fitted = [x * s / n if n and s else x for x, s, n in zip(fitted, sums, counts)]
        fitted[-1] = fitted[-1] if told else overhead
    return fitted[:-1], fitted[-1]


def fit_samples(
    sizes: Sequence[Sequence[float]], every: Sequence[int], allowance: float
) -> list[int]:
    """Which of its sizes each layer takes: the largest with which all layers fit, or nearly.

    Args:
        sizes: per layer the seconds of one update at each sample size, largest sample first.
        every: per layer, the steps from one possible update to the next.
        allowance: seconds a step.
    """
    chosen = [0] * len(sizes)
    while sum(s[i] / k for s, i, k in zip(sizes, chosen, every)) > allowance:
        savings = [
            ((s[i] - s[i + 1]) / k, -layer)
            for layer, (s, i, k) in enumerate(zip(sizes, chosen, every))
            if i + 1 < len(s) and s[i + 1] <= _WORTH * s[i]
        ]
        if not savings:
            break
        chosen[-max(savings)[1]] += 1
    return chosen


class Schedule:
    """The state of the decisions for ``layers`` layers; see the module's text.

    ``sizes``: per layer its sample sizes and their planned costs, empty while unknown (such a
    layer is updated whenever it can be, free of charge). ``scale``: measured over planned cost.
    ``base``: seconds of a step without any update, None while unknown. ``chosen``: the layers of
    the step to come.
    """

    def __init__(self, share: float, layers: int) -> None:
        self.share = share
        self.step = 0
        self.base: float | None = None
        self.overhead = 1e-4  # until measured
        self.sizes: list[Sizes] = [()] * layers
        self.scale = [1.0] * layers
        self.size = [0] * layers  # index into sizes
        self.bank = 0.0
        self.last = [-1] * layers
        self.updates = [0] * layers  # since the warm-up
        self.losses: list[list[float]] = [[] for _ in range(layers)]
        self.chosen: list[int] = list(range(layers))

    # Costs.

    @property
    def allowance(self) -> float:
        """Seconds of updates a step."""
        return max(0.0, (self.base or 0.0) * self.share / (1 - self.share) - self.overhead)

    def cost(self, layer: int) -> float:
        """Seconds of one update at the layer's present sample size."""
        sizes = self.sizes[layer]
        return self.scale[layer] * sizes[self.size[layer]][1] if sizes else 0.0

    def costs(self) -> list[float]:
        return [self.cost(layer) for layer in range(len(self.sizes))]

    def part(self, layer: int) -> float:
        """The part of the full sample that the layer's updates take."""
        return self.sizes[layer][self.size[layer]][0] if self.sizes[layer] else 1.0

    def calibrate(
        self, base: float, every: Sequence[int], steps: Sequence[tuple[Sequence[int], float]] = ()
    ) -> None:
        """Set the costs, and from them the sample sizes.

        Args:
            base: seconds of a step without any update.
            every: as of ``fit_samples``.
            steps: as of ``fit_costs``, those since the last calibration; none: the costs stay as
                they are. After the warm-up the bank makes up for what they took against what it
                paid, so that the share of all steps up to here is right.
        """
        before, paid = self.costs(), self.allowance
        warming_up = self.base is None
        self.base = base
        fitted, self.overhead = fit_costs(before, self.overhead, steps)
        if not warming_up:
            for layers, seconds in steps:
                usual = self.overhead + sum(fitted[i] for i in layers)
                taken = min(seconds, _OUTLIER * usual) - self.overhead
                self.bank += self.allowance - paid - taken + sum(before[i] for i in layers)
        self.scale = [s * b / a if a else s for s, a, b in zip(self.scale, before, fitted)]
        of_sizes = [
            [t * scale for _, t in sizes] or [0.0] for sizes, scale in zip(self.sizes, self.scale)
        ]
        after = fit_samples(of_sizes, every, self.allowance)
        for layer, (old, new) in enumerate(zip(self.size, after)):
            if old != new:
                self.losses[layer].clear()  # a smaller sample's loss is larger: not comparable
        self.size = after

    # Decisions.

    def observe(self, layer: int, loss: float) -> None:
        """The loss at one of the layer's updates; NaN and Inf are passed over."""
        if abs(loss) < float("inf"):
            self.losses[layer].append(loss)
            del self.losses[layer][: -2 * WINDOW]

    def gain(self, layer: int) -> float | None:
        """How far one update lowers the layer's loss; None while no loss is known."""
        losses = self.losses[layer]
        if not losses:
            return None
        new, old = losses[-WINDOW:], losses[:-WINDOW]
        level = sum(new) / len(new)
        fall = (sum(old) / len(old) - level) / WINDOW if len(old) == WINDOW else 0.0
        return max(fall, _FALL * level)

    def choose(self, possible: Sequence[int], every: Sequence[int]) -> list[int]:
        """Go on to the next step; returns the layers to update in it, all of them ``possible``."""
        self.step += 1
        if self.step < WARM_UP or self.base is None:
            self.chosen = list(possible)
        else:
            self.chosen = sorted(self._afford(possible, every))
            for layer in self.chosen:
                self.updates[layer] += 1
        for layer in self.chosen:
            self.last[layer] = self.step
        return self.chosen

    def _afford(self, possible: Sequence[int], every: Sequence[int]) -> list[int]:
        costs, allowance = self.costs(), self.allowance
        # all that may be saved up: for the dearest update, and over steps where none is possible
        limit = allowance * max(every, default=1) + max(costs, default=0.0)
        self.bank = min(self.bank + allowance, limit)
        patience = ROUNDS * max(sum(costs), allowance)
        gains = [self.gain(layer) for layer in range(len(costs))]
        unknown = max((g for g in gains if g is not None), default=1.0)

        def order(layer: int) -> tuple[bool, float, int]:
            age = self.step - self.last[layer]
            if age * allowance > patience:
                return (False, -age, layer)
            gain = gains[layer]
            gain = unknown if gain is None else gain
            return (True, -gain / costs[layer] * age, layer)

        taken = [layer for layer in possible if costs[layer] == 0]
        if allowance == 0:
            return taken
        for layer in sorted((layer for layer in possible if costs[layer] > 0), key=order):
            if costs[layer] > self.bank:
                break
            self.bank -= costs[layer]
            taken.append(layer)
        return taken

    # Checkpoints.

    def state(self) -> dict[str, Any]:
        """All of it in plain Python values, not shared with the schedule."""
        return {
            **vars(self),
            "sizes": [list(map(list, sizes)) for sizes in self.sizes],
            "losses": [list(losses) for losses in self.losses],
            **{
                key: list(getattr(self, key))
                for key in ("scale", "size", "last", "updates", "chosen")
            },
        }

    def load(self, state: Any) -> None:
        """Take over a ``state()`` of as many layers, but for its share.

        Raises ValueError naming the entry, before anything is changed, if it is not one.
        """
        layers = len(self.sizes)
        if not isinstance(state, dict) or state.keys() != vars(self).keys():
            raise StateError(
                f"schedule={state!r}: expected a dict with the keys {list(vars(self))}"
            )
        for key, (valid, expected) in _entries(layers).items():
            if not valid(state[key]):
                raise StateError(f"schedule has {key}={state[key]!r}: expected {expected}")
        for key, (valid, expected) in _entries_of_layers(state["step"]).items():
            values = state[key]
            if not isinstance(values, list) or len(values) != layers:
                raise StateError(
                    f"schedule has {key}={values!r}: expected a list for {layers} layers"
                )
            for layer, value in enumerate(values):
                if not valid(value):
                    raise StateError(
                        f"schedule has {value!r} as {key} of layer {layer}: expected {expected}"
                    )
        for size, sizes in zip(state["size"], state["sizes"]):
            if size >= max(1, len(sizes)):
                raise StateError(f"schedule has size={size!r}: expected an index into {sizes!r}")
        vars(self).update(
            {
                **state,
                "share": self.share,
                "sizes": [tuple(map(tuple, sizes)) for sizes in state["sizes"]],
                "losses": [list(losses) for losses in state["losses"]],
                **{key: list(state[key]) for key in ("scale", "size", "last", "updates", "chosen")},
            }
        )


# What a state's entries may be: whether a value is one, and what is expected.

_Check = tuple[Callable[[Any], bool], str]


def _entries(layers: int) -> dict[str, _Check]:
    return {
        "share": (is_number, "a finite number"),
        "step": (is_int, "an int of at least 0"),
        "base": (lambda v: v is None or is_seconds(v), f"None, or {_SECONDS}"),
        "overhead": (lambda v: is_number(v, 0, 0) or _is_positive(v), f"0, or {_POSITIVE}"),
        "bank": (lambda v: is_number(v, -_MOST, _MOST), f"{_SECONDS}, or a debt"),
        "chosen": (
            lambda v: are_layers(v, layers) and v == sorted(set(v)),
            f"some of {layers} layers, in their order",
        ),
    }


def _entries_of_layers(step: int) -> dict[str, _Check]:
    return {
        "sizes": (_are_sizes, "pairs of a part of the sample, falling from 1, and its seconds"),
        "scale": (_is_positive, _POSITIVE),
        "size": (is_int, "an index"),
        "last": (lambda v: is_int(v, -1, step), f"a step from -1 to {step}"),
        "updates": (lambda v: is_int(v, 0, step), f"an int from 0 to {step}"),
        "losses": (
            lambda v: isinstance(v, list) and len(v) <= 2 * WINDOW and all(map(is_number, v)),
            f"a list of at most {2 * WINDOW} finite numbers",
        ),
    }


def is_seconds(value: Any) -> bool:
    return is_number(value, 0, _MOST)


def _is_positive(value: Any) -> bool:
    return is_number(value, _LEAST, _MOST)


def are_layers(value: Any, layers: int) -> bool:
    """Whether it is a list of places among so many layers."""
    return isinstance(value, list) and all(is_int(i, 0, layers - 1) for i in value)


def _are_sizes(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(v, list) and len(v) == 2 for v in value)
    if not pairs or not all(is_number(part, 0, 1) and _is_positive(t) for part, t in value):
        return False
    parts = [part for part, _ in value]
    return not parts or (parts[0] == 1 and parts[-1] > 0 and all(a > b for a, b in pairwise(parts)))
