"""The opaque ops on checked arguments, as ``eager/ops.py``; what no kernel covers goes there."""

from __future__ import annotations

from torch import Tensor

from ...choices import gram_choices, update_choices
from ...geometry import ConvGeometry
from ...planner import Choice
from ..eager import ops as eager

patch_mean = eager.patch_mean  # bound by one pass over the input, in any implementation
update_direct = eager.update_direct  # two products of the library's and the update
update_from_gram = eager.update_from_gram
decor_stats = eager.decor_stats


def patch_gram(x: Tensor, geometry: ConvGeometry, choice: Choice | None = None) -> Tensor:
    """S (groups, D, D), by the planner's choice unless one is given. At least one sample."""
    choice = choice or gram_choices(geometry, x.device.type, x.dtype)[0]
    return eager.patch_gram(x, geometry, choice)


def decor_update(
    x: Tensor,
    R: Tensor,
    geometry: ConvGeometry,
    lr: float,
    kappa: float,
    rule: str,
    demean: bool,
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor]:
    """R_new (groups, D, D) and loss (groups,), by the planner's choice of plan unless given."""
    choice = choice or update_choices(geometry, x.device.type, x.dtype)[0]
    if choice.name != "gram":
        return eager.decor_update(x, R, geometry, lr, kappa, rule, demean, choice)
    S = patch_gram(x, geometry, choice.gram)
    if demean:
        m = patch_mean(x, geometry)
        S.baddbmm_(m.unsqueeze(2), m.unsqueeze(1), alpha=-1)
    return update_from_gram(S, R, lr, kappa, rule, overwrite=True)
