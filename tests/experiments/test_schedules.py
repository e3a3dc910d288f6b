"""Learning rates over a run."""

from __future__ import annotations

import pytest

from experiments.config import ScheduleConfig
from experiments.schedules import factor


def factors(steps: int = 10, **options: object) -> list[float]:
    schedule = ScheduleConfig(**options)  # type: ignore[arg-type]
    return [factor(schedule, step, steps) for step in range(steps)]


def test_constant_and_its_warm_up() -> None:
    assert factors(name="constant") == [1.0] * 10
    assert factors(name="constant", warmup=0.3, final=0.5) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_linear() -> None:
    assert factors(11, name="linear") == pytest.approx([1 - i / 10 for i in range(11)])
    values = factors(name="linear", warmup=0.2, final=0.1)
    assert values[:2] == pytest.approx([1 / 3, 2 / 3])
    assert values[2] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert values[3] - values[4] == pytest.approx(values[7] - values[8])


def test_cosine() -> None:
    values = factors(11, name="cosine", final=0.2)
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.6)
    assert values[-1] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)


def test_onecycle_is_torchs() -> None:
    import torch

    steps, warmup = 20, 0.25
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    # torch counts the peak among the steps that rise, and falls to 1e-4 of where it began
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, steps, pct_start=(warmup * steps + 1) / steps, cycle_momentum=False
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = factors(steps, name="onecycle", warmup=warmup, final=1 / 25 / 1e4)
    assert ours == pytest.approx(expected)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "onecycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_never_above_1_nor_below_0(name: str, steps: int) -> None:
    for warmup in (0.0, 0.5, 0.99):
        assert all(0 <= value <= 1 for value in factors(steps, name=name, warmup=warmup))


def test_unknown() -> None:
    with pytest.raises(ValueError, match=r"schedule\.name is 'step': expected one of"):
        factors(name="step")
