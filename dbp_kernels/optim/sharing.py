"""Layers fed by the same tensor share one R.

R is what a layer's inputs have made of the identity. Layers that have been given the same samples
under the same options all along have the same R: one update of one tensor serves all of them. What a
step is to learn from tells whether that goes on; nothing else has to be remembered.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

from torch import Tensor

from dbp_kernels.optim.site import Site
from dbp_kernels.optim.step import Job
from dbp_kernels.sampling import kind_of


def settle(sites: Sequence[Site], jobs: Sequence[Job], options: Collection[str]) -> list[Job]:
    """One job for all layers that share R, whose Rs are made the same tensor, or different ones.

    No R changes its values. Sites that have not been compared with others yet, or not since
    something unusual, are compared now, which waits for the device.

    Args:
        sites: all of them, as the jobs count them.
        jobs: those that are due.
        options: the names of those that must agree.
    """
    alike: dict[Hashable, list[Site]] = {}
    key_of: dict[Site, Hashable] = {}  # of those that change
    for job in jobs:
        if job.samples:
            site = sites[job.index]
            own = (job.options.get(name) for name in options)
            key = key_of[site] = tuple(map(id, job.samples)), kind_of(site), *own
            alike.setdefault(key, []).append(site)
    for members in alike.values():
        if not all(site.compared for site in members):
            _merge(members)
    for together in users(sites):
        parts: dict[Hashable, list[Site]] = {}
        for site in together:
            parts.setdefault(key_of.get(site), []).append(site)
        for part in list(parts.values())[1:]:
            R = part[0].R.clone()
            for site in part:
                site.R = R
    first = {id(job.R): job for job in reversed(jobs) if job.samples}
    return [job for job in jobs if not job.samples or first[id(job.R)] is job]


def part(sites: Sequence[Site], of: Sequence[Site]) -> None:
    """Give some sites ``of`` all an R each; they may share again once they are found equal."""
    for together in users(of):
        left = len(together)
        for site in together:
            if site in sites and left > 1:
                site.R = site.R.clone()
                left -= 1
    for site in sites:
        site.compared = False


def users(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites by the R they have; most are alone."""
    found: dict[int, list[Site]] = {}
    for site in sites:
        found.setdefault(id(site.R), []).append(site)
    return list(found.values())


def _merge(sites: Sequence[Site]) -> None:
    """Sites whose Rs are equal have the first one's."""
    kept: list[Tensor] = []
    for site in sites:
        site.compared = True
        equal = (R for R in kept if R is site.R or _equal(R, site.R))
        site.R = next(equal, site.R)
        kept.append(site.R)


def _equal(R: Tensor, other: Tensor) -> bool:
    return (R.dtype, R.device) == (other.dtype, other.device) and R.equal(other)
