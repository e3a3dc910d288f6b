"""RunConfig: strict in keys and types, there and back, changed by dotted keys."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import dbp_kernels as dbp
from experiments.config import DecorConfig, RunConfig, parse_yaml
from experiments.data import Augment
from experiments.models import build_model
from experiments.optimizers import Optimizers
from experiments.schedules import factor

CONFIGS = Path(__file__).resolve().parents[2] / "experiments" / "configs"


def test_there_and_back() -> None:
    config = RunConfig.from_dict(
        {"seed": 3, "decor": {"lr": 1e-3, "sample": 6}, "model": {"options": {"widths": [1, 2]}}}
    )
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict(parse_yaml(config.to_yaml())) == config
    assert config.decor is not None
    assert config.decor.sample == 6
    assert isinstance(config.decor.sample, int)


def test_an_int_stands_for_a_float_where_no_int_may_be() -> None:
    config = RunConfig.from_dict({"optimizer": {"lr": 1}})
    assert isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "learning_rate is 1: expected one of the keys"),
        ({"optimizer": {"eps": 1}}, r"optimizer\.eps is 1: expected one of the keys"),
        ({"optimizer": {"lr": "fast"}}, r"optimizer\.lr is 'fast': expected float"),
        ({"optimizer": {"lr": float("inf")}}, r"optimizer\.lr is inf: expected a positive"),
        ({"optimizer": {"lr": None}}, r"optimizer\.lr is None: expected float"),
        ({"optimizer": 3}, "optimizer is 3: expected a mapping"),
        ({"epochs": True}, "epochs is True: expected int"),
        ({"epochs": 1.5}, "epochs is 1.5: expected int"),
        ({"epochs": 0}, "epochs is 0: expected at least 1"),
        ({"amp": "fp16"}, "amp is 'fp16': expected None or 'bf16'"),
        ({"data": {"augment": ["crop", 2]}}, r"data\.augment\[1\] is 2: expected str"),
        ({"data": {"train_size": 0}}, r"data\.train_size is 0"),
        ({"schedule": {"warmup": 1.0}}, r"schedule\.warmup is 1\.0"),
        ({"decor": {"mode": "none"}}, r"decor\.mode is 'none': expected one of"),
        ({"decor": {"sample": "x"}}, r"decor\.sample is 'x': expected float or int"),
    ],
)
def test_errors_name_key_and_value(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


def test_override() -> None:
    plain = RunConfig()
    changed = plain.override({"optimizer.lr": 0.1, "model.options.widths": [8], "decor.kappa": 0.2})
    assert changed.optimizer.lr == 0.1
    assert changed.model.options == {"widths": [8]}
    assert changed.decor == DecorConfig(kappa=0.2)
    assert changed.override({"decor": None}).decor is None
    assert plain == RunConfig()
    with pytest.raises(ValueError, match=r"optimizer\.speed is 1"):
        plain.override({"optimizer.speed": 1})
    with pytest.raises(ValueError, match=r"epochs\.x: epochs is 10"):
        plain.override({"epochs.x": 1})


def test_options_are_nobody_elses() -> None:
    widths = [8]
    config = RunConfig.from_dict({"model": {"options": {"widths": widths}}})
    widths.append(9)
    assert config.model.options == {"widths": [8]}


def test_differences() -> None:
    a, b = RunConfig(), RunConfig().override({"optimizer.lr": 0.1, "model.options.widths": [8]})
    assert a.differences(a) == []
    assert a.differences(b) == ["optimizer.lr: 0.001, 0.1", "model.options.widths: None, [8]"]


def test_numbers_without_a_point() -> None:
    assert parse_yaml("[1e-3, -2E5, 3, x1e3]") == [1e-3, -2e5, 3, "x1e3"]


def test_yaml_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("optimizer: {lr: [}")
    with pytest.raises(ValueError, match=r"a\.yaml"):
        RunConfig.from_yaml(path)
    path.write_text("optimizer: {speed: 3}")
    with pytest.raises(ValueError, match=r"a\.yaml: optimizer\.speed"):
        RunConfig.from_yaml(path)
    path.write_text("")
    assert RunConfig.from_yaml(path) == RunConfig()


def test_decor_has_the_options_of_attach() -> None:
    theirs = inspect.signature(dbp.attach).parameters
    ours = {f.name: f.default for f in fields(DecorConfig) if f.name != "mode"}
    assert set(theirs) - set(ours) == {"model", "optimizer", "process_group"}
    assert MISSING not in ours.values()
    assert {name: theirs[name].default for name in ours} == ours


SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "parquet": (3, 224, 224),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_files_are_valid(path: Path) -> None:
    config = RunConfig.from_yaml(path)
    shape = SHAPES[config.data.name]
    model = build_model(config.model.name, shape, 10, **config.model.options)
    Optimizers(config.override({"decor": None}), model)  # whose R would take gigabytes
    factor(config.schedule, 0, 10)
    Augment.parse(config.data.augment).check(*shape[1:])
