"""W, R and the learner's state in the optimiser's own ``state_dict()``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dbp_kernels import user_warnings
from dbp_kernels.loaded import StateError, is_int, why_no_R, why_no_tensor
from dbp_kernels.optim.engine import Engine
from dbp_kernels.optim.guard import CLIPPED, SKIPPED
from dbp_kernels.optim.options import is_rate
from dbp_kernels.optim.site import Site
from dbp_kernels.optim.state_dict import generator_of, valid_phases, why_no_report
from dbp_kernels.optim.swap import some

# In each of the saved param_groups that has attached weights, by name. Not in "state": what is
# loaded from there is cast to the weight's dtype, and R must stay float32; nor beside it:
# torch.distributed.checkpoint drops keys it does not know. It also drops, from states it has
# flattened, what it does not find in the live groups: those have the key too, with None.
KEY = "dbp"
_PROGRESS = {"steps", "phases", "budget", "highest_lr"}


def is_attached(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser's state has W and R of a handle already."""
    hooks = optimizer._optimizer_state_dict_post_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), Checkpoint) for hook in hooks)


class Checkpoint:
    """Adds what is ours to an optimiser's ``state_dict()``, and takes it out of a loaded one.

    What an optimiser has loaded before it is attached is taken over at once. ``register()`` is to
    follow.

    Args:
        optimizer: the weights'.
        sites: of its parameters.
        engine: the learner of R.
        model: that of the sites.

    Raises ValueError, before anything is changed, if what is loaded, then or later, is not ours: an
    R or W of another shape or of a layer that the model does not have, an R that is not finite or
    absurdly large (`loaded.MAX_NORM`), counts, turns, budget or generator that are none.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sites: Sequence[Site],
        engine: Engine,
        model: nn.Module,
    ) -> None:
        self._optimizer, self._sites, self._engine = optimizer, sites, engine
        self._model = model
        self._loaded: list[dict[str, Any]] = []
        self._handles: list[RemovableHandle] = []
        found = _found(optimizer.param_groups)
        if found:
            self._check(found)
            self._loaded = found
            _tell(self._take_over())

    def register(self) -> None:
        """From now on the optimiser's state has what is ours."""
        self._handles = [
            self._optimizer.register_state_dict_post_hook(self._save),
            self._optimizer.register_load_state_dict_pre_hook(self._take_out),
            self._optimizer.register_load_state_dict_post_hook(self._load),
        ]
        self.mark()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for group in self._optimizer.param_groups:
            group.pop(KEY, None)

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = []
        for live, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
            layers = {site.name: self._layer(site) for site in self._held(live)}
            groups.append({**saved, KEY: {"layers": layers, **self._common()}} if layers else saved)
        return {**state_dict, "param_groups": groups}

    def _held(self, group: dict[str, Any]) -> list[Site]:
        """The sites whose weights a group has."""
        held = {id(p) for p in group["params"]}
        return [site for site in self._sites if id(site.weight) in held]

    # torch.distributed.checkpoint loads what a state has already, and takes lists apart: so every
    # key is always there, and what changes its length is text.

    def _layer(self, site: Site) -> dict[str, Tensor]:
        state = self._engine.state.get(site.R)
        if state is None:  # never updated
            counts = {kind: torch.zeros(()).long() for kind in (SKIPPED, CLIPPED)}
            state = {"loss": site.R.new_full((), torch.nan), **counts}
        own = {"R": site.R, **state}
        if sum(site.R is other.R for other in self._engine._sites) > 1:
            # torch.distributed.checkpoint loads into these, and what it loads may differ
            own = {key: value.clone() for key, value in own.items()}
        return {"W": site.W, **own}

    def _common(self) -> dict[str, Any]:
        own = self._engine.state_dict()
        progress = {key: own.get(key) for key in ("steps", "phases", "budget")}
        progress["highest_lr"] = {site.name: site.highest_lr for site in self._engine._sites}
        # on the device of the rest, as torch.distributed.checkpoint wants all vectors on one
        generator = own["generator"].to(self._sites[0].R.device)
        return {"progress": json.dumps(progress), "generator": generator}

    def _take_out(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        groups = state_dict.get("param_groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            return None  # torch says what is wrong with it
        loaded = _found(groups)
        self._check(loaded)
        self._loaded = loaded
        plain = [{k: v for k, v in group.items() if k != KEY} for group in groups]
        return {**state_dict, "param_groups": plain}

    def _check(self, loaded: Sequence[Any]) -> None:
        """Raises StateError, before anything is changed, unless all of it can be loaded."""
        for part in loaded:
            valid = isinstance(part, dict) and {"layers", "progress", "generator"} <= part.keys()
            if not valid or not isinstance(part["layers"], dict):
                raise _refused(f"under {KEY!r} what attach has not saved: {part!r}")
        layers = _layers(loaded)
        known = {name for name, _ in self._model.named_modules(remove_duplicate=False)}
        known |= {type(self._model).__name__, *(site.name for site in self._sites)}
        for name in layers:
            if name not in known:
                raise _refused(f"an R of {name!r}, which is no layer of this model")
        for site in self._sites:
            if site.name in layers:
                _check_layer(site, layers[site.name])
        same = layers.keys() == {site.name for site in self._sites}
        for part in loaded:
            self._check_common(part, same)

    def _check_common(self, common: dict[str, Any], same: bool) -> None:
        generator = generator_of(common["generator"])
        if isinstance(generator, str):
            raise _refused(generator)
        try:
            progress = json.loads(common["progress"])
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(f"a progress that is no JSON ({error})") from None
        if not isinstance(progress, dict) or progress.keys() != _PROGRESS:
            raise _refused(f"progress={progress!r}: expected {sorted(_PROGRESS)}")
        rates = progress["highest_lr"]
        if not isinstance(rates, dict) or not all(map(is_rate, rates.values())):
            raise _refused(f"highest_lr={rates!r}: expected a number of at least 0 for each layer")
        if not is_int(progress["steps"]):
            raise _refused(f"steps={progress['steps']!r}: expected an int of at least 0")
        phases = progress["phases"]
        layers = len(phases) if isinstance(phases, list) else 0
        if not valid_phases(phases, layers):
            raise _refused(f"phases={phases!r}: expected None, or an int for each layer")
        if same and self._engine._budget is not None:
            self._engine._budget.restored(progress["budget"])

    def mark(self) -> None:
        """Put the key into the live groups."""
        for group in self._optimizer.param_groups:
            if self._held(group):
                group[KEY] = None

    def _load(self, optimizer: Any) -> None:
        told = self._take_over()
        self.mark()
        _tell(told)  # last, as warnings may be made errors

    @torch.no_grad()
    def _take_over(self) -> list[str]:
        """Go on from what was loaded; returns what is to be told of it."""
        loaded, self._loaded = self._loaded, []
        layers = _layers(loaded)
        own = [site.name for site in self._sites]
        plain = [name for name in own if name not in layers]
        ignored = [name for name in layers if name not in own]
        self._engine.part(self._sites)
        for site in self._sites:
            entry = layers.get(site.name)
            if entry is None:
                site.reset()
                self._engine.state.pop(site.R, None)
                continue
            site.W.copy_(entry["W"])
            site.R.copy_(entry["R"])
            if entry["skipped"] or not entry["loss"].isnan():
                for key, value in self._engine._state_of(site.R).items():
                    # saved before there was a clip, nothing was clipped
                    value.copy_(entry[key]) if key in entry else value.zero_()
            else:
                self._engine.state.pop(site.R, None)
        if loaded:
            self._restore(loaded[0], same=not plain and not ignored)
        self._engine.discard()
        told = []
        if plain:
            told.append(
                f"the loaded optimiser state has no R of {some(plain)}: R = I and W = the weight "
                "as it is; expected the state of an optimiser under dbp.attach with these layers"
            )
        if ignored:
            told.append(
                f"the loaded optimiser state has an R of {some(ignored)}, which are not attached "
                "here: they go on as plain layers"
            )
        return told

    def _restore(self, common: dict[str, Any], same: bool) -> None:
        """Turns and budget begin anew unless they are the ``same`` layers'."""
        engine = self._engine
        progress = json.loads(common["progress"])
        phases = progress["phases"] if same else None
        engine._steps = progress["steps"]
        for site in self._sites:
            site.highest_lr = float(progress["highest_lr"].get(site.name, 0.0))
        engine._phases = phases if valid_phases(phases, len(engine._sites)) else None
        engine._generator.set_state(common["generator"].cpu())
        engine._ranks_agree = False
        if engine._budget is not None:
            engine._budget = engine._budget.restored(progress["budget"] if same else None)


def _found(groups: Sequence[dict[str, Any]]) -> list[Any]:
    """What is ours in parameter groups."""
    values = [group.get(KEY) for group in groups]
    return [value for value in values if value is not None and value != {}]


def _layers(loaded: Sequence[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    return {name: entry for part in loaded for name, entry in part["layers"].items()}


def _check_layer(site: Site, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise _refused(f"{entry!r} for {site.name!r}: expected its W, R and reports")
    for key, own, why_not in (("W", site.W, why_no_tensor), ("R", site.R, why_no_R)):
        reason = why_not(entry.get(key), own.shape)
        if reason is None and entry[key].is_meta:
            reason = "is on meta: expected values"
        if reason is not None:
            raise _refused(f"a {key} of {site.name!r} {_that(reason)}")
    reason = why_no_report(entry)
    if reason is not None:
        raise _refused(f"an entry of {site.name!r} whose {reason}")


def _that(reason: str) -> str:
    return reason if reason.startswith("of ") else f"that {reason}"


def _refused(what: str) -> StateError:
    return StateError(f"the loaded optimiser state has {what}")


def _tell(told: Sequence[str]) -> None:
    for text in told:
        user_warnings.warn(text)
