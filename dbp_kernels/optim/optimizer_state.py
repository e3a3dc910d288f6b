"""W, R and the learner's state in the optimiser's own ``state_dict()``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dbp_kernels.optim.decor_update import DecorUpdate
from dbp_kernels.optim.site import Site
from dbp_kernels.optim.swap import some

# In each of the saved param_groups that has attached weights, by name. Not in "state": what is
# loaded from there is cast to the weight's dtype, and R must stay float32; nor beside it:
# torch.distributed.checkpoint drops keys it does not know.
KEY = "dbp"


class Checkpoint:
    """Adds what is ours to an optimiser's ``state_dict()``, and takes it out of a loaded one."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, sites: Sequence[Site], engine: DecorUpdate
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

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = []
        for live, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
            held = {id(p) for p in live["params"]}
            layers = {s.name: self._layer(s) for s in self._sites if id(s.weight) in held}
            groups.append({**saved, KEY: {"layers": layers, **self._common()}} if layers else saved)
        return {**state_dict, "param_groups": groups}

    def _layer(self, site: Site) -> dict[str, Tensor]:
        return {"W": site.W, "R": site.R, **self._engine.state.get(site.R, {})}

    def _common(self) -> dict[str, Any]:
        own = self._engine.state_dict()
        return {key: own[key] for key in ("steps", "generator", "phases", "budget") if key in own}

    def _take_out(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = state_dict["param_groups"]
        self._loaded = [group[KEY] for group in groups if KEY in group]
        plain = [{k: v for k, v in group.items() if k != KEY} for group in groups]
        return {**state_dict, "param_groups": plain}

    def _adopt(self) -> None:
        """What an optimiser loaded before it was attached."""
        found = [g.pop(KEY) for g in self._optimizer.param_groups if KEY in g]
        if found:
            self._loaded = found
            self._load(self._optimizer)

    @torch.no_grad()
    def _load(self, optimizer: Any) -> None:
        loaded, self._loaded = self._loaded, []
        layers = {name: entry for part in loaded for name, entry in part["layers"].items()}
        plain = [site.name for site in self._sites if site.name not in layers]
        if plain:
            warnings.warn(
                f"the loaded optimiser state has no R of {some(plain)}: R = I and W = the weight "
                "as it is; expected the state of an optimiser under dbp.attach with these layers",
                stacklevel=4,
            )
        self._engine._follow_R()
        for site in self._sites:
            entry = layers.get(site.name)
            if entry is None:
                site.reset()
                self._engine.state.pop(site.R, None)
                continue
            site.W.copy_(entry["W"])
            site.R.copy_(entry["R"])
            if "loss" in entry:
                state = self._engine._state_of(site.R)
                state["loss"].copy_(entry["loss"])
                state["skipped"].copy_(entry["skipped"])
        if loaded:
            self._restore(loaded[0])
        self._engine.discard()

    def _restore(self, common: dict[str, Any]) -> None:
        engine = self._engine
        engine._steps = common["steps"]
        engine._generator.set_state(common["generator"].cpu())
        engine._phases = common.get("phases")
        engine._ranks_agree = False
        if engine._budget is not None:
            engine._budget = engine._budget.restored(common.get("budget"))
