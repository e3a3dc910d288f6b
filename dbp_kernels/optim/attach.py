"""``dbp.attach``: one line beside an optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from dbp_kernels.distributed import unwrap
from dbp_kernels.loaded import is_int
from dbp_kernels.nn import is_decorrelated
from dbp_kernels.optim.engine import Engine
from dbp_kernels.optim.handle import Attached
from dbp_kernels.optim.kinds import patches_of
from dbp_kernels.optim.optimizer_state import is_attached
from dbp_kernels.optim.options import are_several
from dbp_kernels.optim.site import Site, is_fed
from dbp_kernels.selection import Filter, Rules, Selection, aliases_of, multiplies


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    lr: float = 1e-3,
    kappa: float = 0.5,
    sample: float | int = 0.1,
    rule: str = "standard",
    update_every: int = 1,
    demean: bool = False,
    sampling: str = "first",
    budget: float | None = None,
    costs: str = "measured",
    matmul_precision: str | None = None,
    include: Filter = None,
    exclude: Filter = None,
    groups: Iterable[dict[str, Any]] | None = None,
    process_group: dist.ProcessGroup | None = None,
    max_size: int | None = None,
    stagger: bool = True,
    clip: float | None = 0.5,
    cuda_graph: bool | None = None,
    follow_lr: bool = True,
) -> Attached:
    """Train a model with decorrelated backpropagation, by one line after its optimiser is made::

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        decor = dbp.attach(model, optimizer)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    The model stays an ordinary one, whose weights hold A = W R: nothing has to be undone to export,
    save or average it. ``optimizer.step()`` does the rest: for each attached weight it forms
    dL/dW = (dL/dA) R^T, the optimiser makes its step on W, R learns from samples of the layer's
    input, and A = W R goes back into the weight. That is DBP exactly (arXiv 2405.02385, eq. 3 and
    section 2.2): weight decay acts on W. Gradients that are clipped before ``step()`` are
    those of A, unless ``decor.transform_gradients()`` was called.

    Layers whose weights ``optimizer.add_param_group()`` brings later, as when a network is unfrozen
    part by part, are attached then, with the options given here, not those of ``groups``.

    ``optimizer.state_dict()`` has W and R, and ``load_state_dict()`` continues from them; so do the
    state dicts of torch.distributed.checkpoint (which repeats all R for every parameter of a group
    if told to flatten them). Copies and pickles of model and optimiser are a plain pair, which goes on
    from the weights A; with those of the handle, made in one go, they are an attached pair. A spawned process that is
    handed all of them shares W and R with this one, as torch has it share the weights.

    Layers fed by the very same tensor, as q, k and v of attention are, share one R, one set of samples
    and one update from their first step on, as long as they see the same and have the same options;
    ``print()`` of the handle says which. It changes no result, but that random samples are drawn
    once for all of them, and that they have their turn at the same step. Layers in code compiled by torch.compile do not share, and none do with a
    budget or several ranks. Forward passes without gradients give no samples, but for the first of a
    reentrant activation checkpoint.

    Nothing is half done. Whatever ``step()`` raises, the parameters then hold A = W R, a checkpoint can be
    written, and training goes on. All R and what is counted and planned of them are as before the
    step or as after it, as for ``DecorUpdate.step()``. So is W if the error is not of the optimiser's
    own step; if it is, the weights and the optimiser's state are what torch leaves. An error that
    comes between the two, such as memory that does not suffice for R's update, leaves W stepped and
    R as it was, which is a step from which R has not learnt. W, R or weights that cannot be written
    to (expanded, made in inference mode) raise RuntimeError before the optimiser's step. Signals with
    Python handlers wait while R and A change.

    Weights may be written to between steps: the network stays what it was made, and W becomes
    A R^-1, with a warning. Writes through ``.data`` show on CPUs only, by some 256 entries of each
    weight; on GPUs, where looking would wait for the device, they are lost.

    Args:
        model: any module; layers of the kinds that ``dbp.register`` knows are attached: Linear,
            convolutions and transposed ones. ``left_alone()`` of the handle says what is not, and why.
        optimizer: the optimiser of the model's weights, or several, which may step in any order: R
            learns once all have that have gradients.
        lr, kappa, sample, rule, update_every, demean, sampling, budget, costs, matmul_precision,
            process_group, stagger, clip: as for `DecorUpdate`.
        cuda_graph: as for `DecorUpdate`; with it A = W R is formed in the same CUDA graph. None: True
            but with a budget. On an H100 a ResNet-18's step takes three quarters of the time with it.
        follow_lr: multiply R's lr by what the optimiser's lr is now, as a share of the highest that it has
            had for the weight: while a schedule lets it fall R falls to rest with it, and warm-up
            slows down the weights alone. The paper's R learns at a constant rate (False); then A = W R,
            which changes with R, is never at rest.
            An lr that is a tensor on a GPU is not followed, as to read it is to wait for the device.
        include, exclude: layers, as for `decorrelate_model`.
        groups: options of their own for some layers: ``[{"modules": <as include>, "lr": ...}]``.
        max_size: layers whose R would have more than max_size rows are left alone. R takes
            4 D^2 bytes for patches of D entries.

    Returns:
        A handle: what is attached, losses, R, ``detach()``.

    Raises:
        TypeError: an argument has another type. Nothing is changed.
        ValueError: there is nothing to attach, a layer is decorrelated already, it or an optimiser
            is attached already, or an option is out of range. Nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    optimizers = _optimizers(optimizer)
    if max_size is not None and not is_int(max_size):
        raise ValueError(f"max_size={max_size!r}: expected None, or an int of at least 0")
    if not isinstance(follow_lr, bool):
        raise ValueError(f"follow_lr={follow_lr!r}: expected True or False")
    inner = unwrap(model)
    already = [name for name, module in inner.named_modules() if is_decorrelated(module)]
    if already:
        raise ValueError(
            f"model has the decorrelated layer {already[0]!r}: expected a plain model "
            "(dbp.fuse_model makes it one), or a DecorUpdate"
        )
    sites, left_alone, waiting = _find(inner, optimizers, include, exclude, max_size)
    if not sites:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left_alone.items())[:5])
        raise ValueError(f"found no layer to attach to in the model ({why or 'it has no weights'})")
    if any(map(is_attached, optimizers)):
        raise ValueError(
            "optimizer is attached already, and its state has one handle's W and R: expected "
            "detach() before, or all its layers in one model, such as torch.nn.ModuleList([a, b])"
        )
    engine = Engine(
        sites,
        _grouped(sites, inner, groups),
        lr=lr,
        kappa=kappa,
        sample=sample,
        rule=rule,
        update_every=update_every,
        demean=demean,
        process_group=process_group,
        sampling=sampling,
        budget=budget,
        costs=costs,
        matmul_precision=matmul_precision,
        stagger=stagger,
        clip=clip,
        cuda_graph=budget is None if cuda_graph is None else cuda_graph,
        follow_lr=follow_lr,
    )
    return Attached(inner, optimizers, sites, engine, left_alone, waiting)


def _optimizers(given: Any) -> list[torch.optim.Optimizer]:
    several = [given] if isinstance(given, torch.optim.Optimizer) else given
    if not are_several(several):
        raise TypeError(f"optimizer={given!r}: expected a torch.optim.Optimizer, or several")
    several = [_innermost(optimizer) for optimizer in several]
    if not several:
        raise ValueError("optimizer=[]: expected at least one")
    return several


# whose wrappers pass step() on to the optimiser that they hold; known without importing them
_WRAPPING = {"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"}


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser that steps, within a trainer's wrapper."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer={optimizer!r}: expected a torch.optim.Optimizer")
    kind = type(optimizer)
    if kind.__module__.split(".")[0] in _WRAPPING and hasattr(optimizer, "optimizer"):
        return _innermost(optimizer.optimizer)
    if not getattr(kind.step, "hooked", False):  # torch's __init__ sees to it
        raise TypeError(
            f"optimizer is a {kind.__name__}, whose step() does not run torch's step hooks: expected "
            "a torch.optim.Optimizer whose __init__ has run, such as the one that it wraps"
        )
    return optimizer


def _find(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    include: Filter,
    exclude: Filter,
    max_size: int | None,
) -> tuple[list[Site], dict[str, str], dict[str, nn.Module]]:
    """(sites, {layer: why it is none}, {layer: its module, which only lacks an optimiser})."""
    selection = Selection(model, include, exclude)
    optimised = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    owners = _owners(model)
    sites, left_alone, waiting = [], {}, {}
    for module, aliases in selection.names.items():
        name = aliases[0] or type(module).__name__
        patches = patches_of(module)
        if patches is None:
            if not isinstance(module, ParametrizationList) and multiplies(module):
                left_alone[name] = f"{type(module).__name__} is no kind that dbp.register knows"
            continue
        if isinstance(patches, str):
            left_alone[name] = patches
            continue
        weight = module._parameters[patches.weight]
        others = [other for other in owners[id(weight)] if other not in aliases]
        if (reason := selection.why_not(module)) is not None:
            left_alone[name] = reason
        elif others:
            left_alone[name] = f"its {patches.weight} is that of {others[0]!r} too"
        elif max_size is not None and patches.size > max_size:
            mib = 4 * patches.groups * patches.size**2 / 2**20
            left_alone[name] = (
                f"its R would have {patches.size} > max_size={max_size} rows, {mib:.0f} MiB"
            )
        elif id(weight) not in optimised:
            left_alone[name] = f"its {patches.weight} is not in the optimiser"
            waiting[name] = module
        elif is_fed(module):
            raise ValueError(f"layer {name!r} is attached already: expected detach() before")
        else:
            sites.append(Site(name, module, patches))
    return sites, left_alone, waiting


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The modules that have each parameter, by its id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _grouped(
    sites: list[Site], model: nn.Module, groups: Iterable[dict[str, Any]] | None
) -> list[Any]:
    """The sites as the engine's groups; those that no group names come last."""
    rest, made = list(sites), []
    if groups is not None and not are_several(groups):
        raise TypeError(f"groups={groups!r}: expected None, or dicts with the key 'modules'")
    for group in () if groups is None else groups:
        if not isinstance(group, dict) or "modules" not in group:
            raise TypeError(f"groups contains {group!r}: expected a dict with the key 'modules'")
        chosen = Rules("groups", group["modules"])
        chosen.check(aliases_of(model))
        own = [site for site in rest if chosen(site.name, site.module)]
        if not own:
            raise ValueError(f"groups: no attached layer is left for {group['modules']!r}")
        rest = [site for site in rest if site not in own]
        made.append({**group, "modules": list(_named(own))})
    if rest:
        made.append({"modules": list(_named(rest))})
    return made


def _named(sites: Iterable[Site]) -> Iterator[tuple[str, Site]]:
    for site in sites:
        yield site.name, site
