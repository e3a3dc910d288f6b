"""W, R and the learner's state in the optimiser's own ``state_dict()``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dbp_kernels import user_warnings
from dbp_kernels.optim.engine import Engine
from dbp_kernels.optim.guard import CLIPPED, SKIPPED
from dbp_kernels.optim.site import Site
from dbp_kernels.optim.state_dict import valid_phases
from dbp_kernels.optim.swap import some

# In each of the saved param_groups that has attached weights, by name. Not in "state": what is
# loaded from there is cast to the weight's dtype, and R must stay float32; nor beside it:
# torch.distributed.checkpoint drops keys it does not know. It also drops, from states it has
# flattened, what it does not find in the live groups: those have the key too, with None.
KEY = "dbp"


def is_attached(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser's state has W and R of a handle already."""
    hooks = optimizer._optimizer_state_dict_post_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), Checkpoint) for hook in hooks)


class Checkpoint:
    """Adds what is ours to an optimiser's ``state_dict()``, and takes it out of a loaded one."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, sites: Sequence[Site], engine: Engine
    ) -> None:
        self._optimizer, self._sites, self._engine = optimizer, sites, engine
        self._loaded: list[dict[str, Any]] = []
        self._handles = [
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._take_out),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        self._adopt()

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
        # on the device of the rest, as torch.distributed.checkpoint wants all vectors on one
        generator = own["generator"].to(self._sites[0].R.device)
        return {"progress": json.dumps(progress), "generator": generator}

    def _take_out(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = state_dict["param_groups"]
        loaded = [group[KEY] for group in groups if group.get(KEY)]
        self._check(loaded)
        self._loaded = loaded
        plain = [{k: v for k, v in group.items() if k != KEY} for group in groups]
        return {**state_dict, "param_groups": plain}

    def _check(self, loaded: list[dict[str, Any]]) -> None:
        """Raises ValueError, before anything is changed, where a layer has another shape."""
        layers = _layers(loaded)
        for site in self._sites:
            for key, own in (("W", site.W), ("R", site.R)):
                if site.name in layers and layers[site.name][key].shape != own.shape:
                    raise ValueError(
                        f"the loaded optimiser state has a {key} of {site.name!r} of shape "
                        f"{tuple(layers[site.name][key].shape)}: expected {tuple(own.shape)}"
                    )

    def _adopt(self) -> None:
        """What an optimiser loaded before it was attached."""
        found = [g[KEY] for g in self._optimizer.param_groups if g.get(KEY)]
        if found:
            self._check(found)
            self._loaded = found
            self._load(self._optimizer)
        self.mark()

    def mark(self) -> None:
        """Put the key into the live groups."""
        for group in self._optimizer.param_groups:
            if self._held(group):
                group[KEY] = None

    @torch.no_grad()
    def _load(self, optimizer: Any) -> None:
        loaded, self._loaded = self._loaded, []
        layers = _layers(loaded)
        own = [site.name for site in self._sites]
        plain = [name for name in own if name not in layers]
        if plain:
            user_warnings.warn(
                f"the loaded optimiser state has no R of {some(plain)}: R = I and W = the weight "
                "as it is; expected the state of an optimiser under dbp.attach with these layers"
            )
        ignored = [name for name in layers if name not in own]
        if ignored:
            user_warnings.warn(
                f"the loaded optimiser state has an R of {some(ignored)}, which are not attached "
                "here: they go on as plain layers"
            )
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
        self.mark()

    def _restore(self, common: dict[str, Any], same: bool) -> None:
        """Turns and budget begin anew unless they are the ``same`` layers'."""
        engine = self._engine
        progress = json.loads(common["progress"])
        phases = progress["phases"] if same else None
        engine._steps = progress["steps"]
        engine._phases = phases if valid_phases(phases, len(engine._sites)) else None
        engine._generator.set_state(common["generator"].cpu())
        engine._ranks_agree = False
        if engine._budget is not None:
            engine._budget = engine._budget.restored(progress["budget"] if same else None)


def _layers(loaded: list[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    return {name: entry for part in loaded for name, entry in part["layers"].items()}
