"""Broken files: each is refused, and nothing has changed; or it loads, and means what it says."""

import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import canonical, mutated
from torch import nn

import dbp_kernels as dbp
from dbp_kernels.planning import calibration, planner
from dbp_kernels.planning.geometry import make_geometry

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {"lr": 1e-2, "sample": 0.5, "sampling": "random"}
BUDGET = {"budget": 0.3, "costs": "planned"}
SHIPPED = sorted(Path(calibration.__file__).with_name("calibrations").glob("*.json"))


def layers(decorrelated: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    return dbp.decorrelate_model(net) if decorrelated else net


class LayerForm:
    """Layers, their optimiser and a DecorUpdate."""

    def __init__(self, **options: Any) -> None:
        self.model = layers(decorrelated=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        torch.manual_seed(1)
        self.decor = dbp.DecorUpdate(self.model, **OPTIONS, **options)

    def step(self, step: int) -> None:
        x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(step))
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.decor.step()
        self.optimizer.zero_grad()

    def everything(self) -> Any:
        return canonical([self.model.state_dict(), self.decor.state_dict()])


class AttachForm(LayerForm):
    """A plain model with its optimiser attached."""

    def __init__(self, **options: Any) -> None:
        self.model = layers(decorrelated=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        torch.manual_seed(1)
        self.decor = dbp.attach(self.model, self.optimizer, **OPTIONS, **options)

    def step(self, step: int) -> None:
        x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(step))
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def everything(self) -> Any:
        return canonical([self.model.state_dict(), self.optimizer.state_dict()])


def trained(form: LayerForm, steps: int = 7) -> LayerForm:
    for step in range(steps):
        form.step(step)
    return form


def loads(load: Any, *arguments: Any) -> bool:
    """Whether it does; if not, by the documented error."""
    try:
        load(*arguments)
    except ValueError:
        return False
    return True


def three_steps(form: LayerForm) -> Any:
    for step in range(100, 103):
        form.step(step)
    return form.everything()


# ------------------------------------------------------------------------------- checkpoints


@pytest.mark.kind("checkpoints")
def test_models(campaign):
    """R in a model's state_dict; its other entries are torch's to check."""
    form, twin = trained(LayerForm()), trained(LayerForm())
    good = copy.deepcopy(form.model.state_dict())
    for rng in campaign.cases(500):
        Rs = mutated({key: good[key] for key in good if key.endswith("R")}, rng)
        state = {**{key: good[key] for key in good if not key.endswith("R")}, **Rs}
        # keys that are nobody's would be torch's error
        state = {key: value for key, value in state.items() if key in good}
        before = form.everything()
        if not loads(form.model.load_state_dict, state):
            assert form.everything() == before
            continue
        for key in ("0.R", "3.R"):
            expected = state.get(key, torch.eye(len(good[key])))
            assert torch.equal(form.model.state_dict()[key], expected.to(torch.float32))
        twin.model.load_state_dict(form.model.state_dict())
        twin.decor.load_state_dict(form.decor.state_dict())
        assert three_steps(form) == three_steps(twin)
        for one in (form, twin):
            one.model.load_state_dict(good)


@pytest.mark.kind("checkpoints")
@pytest.mark.parametrize("options", [{}, {"update_every": 2, "stagger": True}, BUDGET])
def test_decor_updates(campaign, options):
    form, twin = trained(LayerForm(**options)), trained(LayerForm(**options))
    good = copy.deepcopy((form.model.state_dict(), form.decor.state_dict()))
    for rng in campaign.cases(300):
        state = mutated(good[1], rng)
        before = form.everything()
        if not loads(form.decor.load_state_dict, state):
            assert form.everything() == before
            continue
        now = form.decor.state_dict()
        assert now["steps"] == state["steps"]
        assert canonical(now.get("phases")) == canonical(state.get("phases"))
        assert torch.equal(now["generator"], state["generator"])
        for index, entry in state["state"].items():
            for key, value in entry.items():
                ours = now["state"][index][key]
                assert repr(ours.item()) == repr(value.to(ours.dtype).item())
        for ours, theirs in zip(now["param_groups"], state["param_groups"]):
            for key in ("lr", "kappa", "sample", "rule", "update_every", "demean", "sampling"):
                assert ours[key] == theirs[key]
        twin.model.load_state_dict(form.model.state_dict())
        twin.decor.load_state_dict(now)
        assert three_steps(form) == three_steps(twin)
        for one in (form, twin):
            one.model.load_state_dict(good[0])
            one.decor.load_state_dict(good[1])


@pytest.mark.kind("checkpoints")
@pytest.mark.parametrize("options", [{}, {"update_every": 2}, BUDGET])
def test_attached_optimizers(campaign, options):
    form, twin = trained(AttachForm(**options)), trained(AttachForm(**options))
    good = copy.deepcopy((form.model.state_dict(), form.optimizer.state_dict()))
    for rng in campaign.cases(300):
        state = copy.deepcopy(good[1])
        group = state["param_groups"][0]
        own = {**group["dbp"], "progress": json.loads(group["dbp"]["progress"])}
        own = mutated(own, rng)
        progress = own.get("progress")
        if isinstance(progress, dict):
            try:
                own["progress"] = json.dumps(progress)
            except (TypeError, ValueError):
                own["progress"] = repr(progress)
        if rng.random() < 0.1 and isinstance(own.get("progress"), str):
            own["progress"] = own["progress"][: rng.randrange(len(own["progress"]))]
        group["dbp"] = own
        before = form.everything()
        if not loads(form.optimizer.load_state_dict, state):
            assert form.everything() == before
            continue
        form.model.load_state_dict(good[0])  # as whoever resumes does, too
        now = form.optimizer.state_dict()["param_groups"][0]["dbp"]
        for name, theirs in own["layers"].items() if own else ():
            if name not in now["layers"]:
                continue
            ours = now["layers"][name]
            for key in ("W", "R"):
                assert repr(ours[key].tolist()) == repr(theirs[key].to(ours[key].dtype).tolist())
            assert ours["skipped"] == theirs["skipped"]
        if own:
            theirs = json.loads(own["progress"])
            ours = json.loads(now["progress"])
            assert ours["steps"] == theirs["steps"]
        twin.model.load_state_dict(form.model.state_dict())
        twin.optimizer.load_state_dict(copy.deepcopy(form.optimizer.state_dict()))  # torch shares
        assert three_steps(form) == three_steps(twin)
        for one in (form, twin):
            one.model.load_state_dict(good[0])
            one.optimizer.load_state_dict(copy.deepcopy(good[1]))


@pytest.mark.kind("checkpoints")
def test_files_that_were_cut_or_overwritten(campaign):
    """What torch can still read of it is a checkpoint like any other."""
    form = trained(AttachForm())
    layered = trained(LayerForm())
    good = [copy.deepcopy(form.optimizer.state_dict()), layered.decor.state_dict()]
    file = io.BytesIO()
    torch.save([*good, layered.model.state_dict()], file)
    for rng in campaign.cases(150):
        data = bytearray(file.getvalue())
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        try:
            first, second, third = torch.load(io.BytesIO(bytes(data)), weights_only=True)
            group = {**good[0]["param_groups"][0], "dbp": first["param_groups"][0]["dbp"]}
            first = {**copy.deepcopy(good[0]), "param_groups": [group]}
            Rs = {key: third[key] for key in ("0.R", "3.R")}
        except Exception:  # torch's, pickle's, or what is not there
            continue
        before = form.everything(), layered.everything()
        if not loads(form.optimizer.load_state_dict, first):
            assert form.everything() == before[0]
        if not loads(layered.decor.load_state_dict, second):
            assert layered.everything() == before[1]
        loads(layered.model.load_state_dict, {**layered.model.state_dict(), **Rs})
        three_steps(form)
        three_steps(layered)
        form.optimizer.load_state_dict(copy.deepcopy(good[0]))
        layered.decor.load_state_dict(good[1])


# ----------------------------------------------------------------------------- budget states


@pytest.mark.kind("budget states")
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_budget_states(campaign, steps):
    form, twin = (trained(LayerForm(**BUDGET), steps) for _ in range(2))
    good = copy.deepcopy((form.model.state_dict(), form.decor.state_dict()))
    for rng in campaign.cases(350):
        state = {**good[1], "budget": mutated(good[1]["budget"], rng)}
        if rng.random() < 0.05:
            state["budget"] = rng.choice([None, [], {}, 3, "budget", {"schedule": {}}])
        before = form.everything()
        if not loads(form.decor.load_state_dict, state):
            assert form.everything() == before
            continue
        now = form.decor.state_dict()["budget"]
        if state["budget"] is not None:
            share = now["schedule"].pop("share")  # it keeps its own
            assert share == BUDGET["budget"]
            theirs = {k: v for k, v in state["budget"]["schedule"].items() if k != "share"}
            assert _numbers({**now, "pending": []}) == _numbers(
                {**state["budget"], "schedule": theirs, "pending": []}
            )
            assert len(now["pending"]) == len(state["budget"]["pending"])
        twin.decor.load_state_dict(form.decor.state_dict())
        assert three_steps(form) == three_steps(twin)
        assert _told(form.decor.schedule()) == _told(twin.decor.schedule())
        for one in (form, twin):
            one.model.load_state_dict(good[0])
            one.decor.load_state_dict(good[1])


def _told(report: Any) -> str:
    """All of a schedule's report but what the clock says."""
    return str(dataclasses.replace(report, actual=None))


def _numbers(state: Any) -> Any:
    """As ``canonical``, but that 1 is 1.0."""
    if isinstance(state, dict):
        return {key: _numbers(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_numbers(value) for value in state]
    return state


# -------------------------------------------------------------------------- calibration files


@pytest.fixture
def planner_of(monkeypatch):
    """Has the planner reckon with a file from now on, and as before after the test."""

    def use(path: Path) -> None:
        monkeypatch.setenv(calibration.VARIABLE, str(path))
        planner.reset()

    yield use
    monkeypatch.undo()
    planner.reset()


@pytest.mark.kind("calibration files")
def test_calibration_files(campaign, tmp_path, planner_of):
    """Read, each gives every geometry a plan of finite seconds, and a line for the report."""
    contents = [json.loads(path.read_text()) for path in SHIPPED]
    geometries = [
        make_geometry((4, 8, 9, 9), [3, 3], [1, 1], [1, 1], [1, 1], 1),
        make_geometry((2, 3, 32, 32), [7, 7], [2, 2], [3, 3], [1, 1], 1),
        make_geometry((64, 128), [], [], [], [], 1),
    ]
    path = tmp_path / "mine.json"
    for rng in campaign.cases(600):
        content = rng.choice(contents)
        if rng.random() < 0.8:
            content = {**content, "figures": mutated(content["figures"], rng)}
        else:
            content = mutated(content, rng)
        text = json.dumps(content, default=str, skipkeys=True)
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))]
        path.write_text(text)
        try:
            found = calibration.read(path, "mine")
        except ValueError as error:
            assert str(error).startswith("mine: ")  # noqa: PT017
            continue
        found.text.encode()
        planner_of(path)
        calibration.nearest((found,), found.type, "other", "other", 3)
        for geometry in geometries:
            for choices in (planner.gram_choices, planner.update_choices, planner.stats_choices):
                backend = "triton" if found.type == "cuda" else "eager"
                for choice in choices(geometry, found.type, backend=backend, precision="tf32"):
                    assert 0 < choice.seconds < float("inf")
