"""A study: methods compared under one protocol, declared in YAML before anything runs.

Every method gets the same number of trials from one declared space; its setting is chosen by
validation images; the final runs have seeds that no trial has seen. The keys of a file:

    name, title, question      text; the name is that of the file
    base                       the configuration that all runs share (nested, or keys with dots)
    groups                     {name: changes}: each is compared by itself, with a target of its own
    space                      {key: {log|linear: [low, high]} or {choice: [...]}} of every method
    methods                    {name: {set, space, baseline, settings_of}}
    trials                     number of trials of each method that has a space
    tuning_seeds, final_seeds  disjoint
    select                     last, best or earliest: see ``experiments.choice``
    winners_from               the name of a study whose chosen settings are taken; then no trials

A method's ``set`` changes the base; its ``space`` adds to the shared one, or gives other bounds. With
``settings_of`` a method is a control: it takes everything from that method's winner (from the better
one if several are named), and its ``set`` says what is different.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.config import flat, parse_yaml
from experiments.space import Dimension, draws

FOLDER = Path(__file__).resolve().parent / "studies"
KEYS = {
    "name", "title", "question", "base", "groups", "space", "methods", "trials", "tuning_seeds",
    "final_seeds", "select", "winners_from",
}  # fmt: skip
METHOD_KEYS = {"set", "space", "baseline", "settings_of"}
SELECT = ("last", "best", "earliest")


@dataclass(frozen=True)
class Method:
    """One line of the comparison. ``settings_of``: whose winners it takes its settings from."""

    name: str
    changes: dict[str, Any]
    space: tuple[Dimension, ...] = ()
    baseline: bool = False
    settings_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study. ``config`` is flat (keys with dots), ``settings`` what was drawn."""

    study: str
    group: str
    method: str
    phase: str
    trial: int | None
    seed: int
    settings: dict[str, Any]
    config: dict[str, Any]

    @property
    def id(self) -> str:
        """Its folder's name: the same for the same configuration, another for any other."""
        text = json.dumps(self.config, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        parts = [self.phase, self.group, self.method]
        parts += [] if self.trial is None else [f"t{self.trial:02}"]
        return "-".join([*(part for part in parts if part), f"s{self.seed}", digest])


@dataclass(frozen=True)
class Winner:
    """A method's chosen setting: its configuration without a seed, and where it comes from."""

    method: str
    trial: int | None
    settings: dict[str, Any]
    config: dict[str, Any]
    # the larger the better; -inf for a method that has no trial
    merit: tuple[float, float] = (-math.inf, -math.inf)


@dataclass(frozen=True)
class Study:
    """See the head of this module."""

    name: str
    base: dict[str, Any]
    methods: dict[str, Method]
    final_seeds: tuple[int, ...]
    title: str = ""
    question: str = ""
    groups: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    trials: int = 0
    tuning_seeds: tuple[int, ...] = ()
    select: str = "last"
    winners_from: str | None = None
    text: str = ""

    def __post_init__(self) -> None:
        def demand(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f"study {self.name}: {message}")

        demand(bool(self.methods), "methods must name at least one method")
        demand(
            any(m.baseline for m in self.methods.values()), "one method must be a baseline: true"
        )
        demand(self.select in SELECT, f"select must be one of {SELECT}, got {self.select!r}")
        demand(bool(self.final_seeds), "final_seeds must hold at least one seed")
        for seeds in (self.tuning_seeds, self.final_seeds):
            demand(len(set(seeds)) == len(seeds), f"a seed is named twice: {list(seeds)}")
        common = set(self.tuning_seeds) & set(self.final_seeds)
        demand(not common, f"final_seeds must be fresh; also in tuning_seeds: {sorted(common)}")
        tuned = any(m.space for m in self.methods.values())
        demand(not tuned or self.trials >= 1, f"trials must be at least 1, got {self.trials!r}")
        demand(
            not (tuned and self.winners_from), "with winners_from nothing is drawn: leave out space"
        )
        demand(not tuned or bool(self.tuning_seeds), "tuning_seeds must hold at least one seed")
        for method in self.methods.values():
            for other in method.settings_of:
                demand(
                    other in self.methods, f"{method.name}: settings_of names no method: {other!r}"
                )
                demand(
                    not self.methods[other].settings_of,
                    f"{method.name}: settings_of must name a method with settings of its own",
                )
            demand(
                not (method.settings_of and method.baseline),
                f"{method.name}: a method with settings_of is a control, and no baseline",
            )

    def count_runs(self) -> int:
        """Trials and final runs."""
        finals = len(self.groups) * len(self.methods) * len(self.final_seeds)
        return sum(1 for _ in self.tuning_runs()) + finals

    def tuning_runs(self) -> Iterator[PlannedRun]:
        """Trial by trial with the methods taking turns, so that a drifting machine hits all alike."""
        # One axis for a key in all groups; the seed is fixed, the sequence is part of the protocol.
        drawn = draws({m.name: m.space for m in self.methods.values()}, self.trials, seed=0)
        for trial in range(self.trials):
            for seed in self.tuning_seeds:
                for group in self.groups:
                    for method in self.methods.values():
                        if method.space:
                            yield self._run(
                                group, method, "tune", trial, seed, drawn[method.name][trial]
                            )

    def final_runs(self, winners: Mapping[tuple[str, str], Winner]) -> Iterator[PlannedRun]:
        """Seed by seed, the methods taking turns; each seed begins with another of them.

        ``winners``: by (group, method), as ``experiments.choice.winners`` gives them.
        """
        for number, seed in enumerate(self.final_seeds):
            for group in self.groups:
                names = [name for name in self.methods if (group, name) in winners]
                turn = number % len(names) if names else 0
                for name in names[turn:] + names[:turn]:
                    winner = winners[group, name]
                    config = {**winner.config, "seed": seed}
                    yield PlannedRun(
                        self.name, group, name, "final", None, seed, winner.settings, config
                    )

    def config(self, group: str, method: Method) -> dict[str, Any]:
        """The configuration before anything is drawn."""
        return merge(merge(self.base, self.groups[group]), method.changes)

    def _run(
        self,
        group: str,
        method: Method,
        phase: str,
        trial: int,
        seed: int,
        settings: dict[str, Any],
    ) -> PlannedRun:
        config = merge(self.config(group, method), {**settings, "seed": seed})
        return PlannedRun(self.name, group, method.name, phase, trial, seed, settings, config)


def merge(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with ``changes``, both flat: ``{"decor": None}`` takes all of ``decor.*`` away."""
    merged = dict(config)
    for key, value in changes.items():
        for other in list(merged):
            if other.startswith(f"{key}.") or key.startswith(f"{other}."):
                del merged[other]
        merged[key] = value
    return merged


def parse(text: str, source: str = "study") -> Study:
    """A study from YAML text.

    Raises ValueError for keys that are not known, values that make no sense, and a space and a
    ``set`` that both name a key.
    """
    try:
        declared = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {error}") from error
    if not isinstance(declared, dict):
        raise ValueError(f"{source}: expected keys and values, got {declared!r}")
    _known(declared, KEYS, source)
    missing = [key for key in ("name", "base", "methods", "final_seeds") if not declared.get(key)]
    if missing:
        raise ValueError(f"{source}: missing: {', '.join(missing)}")
    shared = declared.get("space") or {}
    groups = declared.get("groups") or {"": {}}
    named = {_name(group, source): flat(changes or {}) for group, changes in groups.items()}
    methods = {}
    for method, values in declared["methods"].items():
        methods[str(method)] = _method(str(method), values or {}, shared, source)
    simple = {
        key: declared[key]
        for key in ("title", "question", "trials", "select", "winners_from")
        if key in declared
    }
    if "tuning_seeds" in declared:
        simple["tuning_seeds"] = tuple(declared["tuning_seeds"])
    return Study(
        name=_name(declared["name"], source),
        base=flat(declared["base"]),
        groups=named,
        methods=methods,
        final_seeds=tuple(declared["final_seeds"]),
        text=text,
        **simple,
    )


def _known(declared: Mapping[str, Any], keys: set[str], where: str) -> None:
    unknown = sorted(set(map(str, declared)) - keys)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {sorted(keys)}")


def _name(name: object, where: str) -> str:
    """It is part of file names."""
    if not re.fullmatch(r"[\w.+-]*", str(name)):
        raise ValueError(f"{where}: a name must be of letters, digits and _.+-, got {name!r}")
    return str(name)


def _method(name: str, values: Mapping[str, Any], shared: Mapping[str, Any], source: str) -> Method:
    where = f"{source}, method {_name(name, source)}"
    _known(values, METHOD_KEYS, where)
    settings_of = values.get("settings_of") or ()
    settings_of = (settings_of,) if isinstance(settings_of, str) else tuple(settings_of)
    if settings_of and values.get("space"):
        raise ValueError(f"{where}: takes its settings from {settings_of}, and has no space")
    space = {} if settings_of else {**shared, **(values.get("space") or {})}
    changes = flat(values.get("set") or {})
    both = sorted(set(changes) & set(space))
    if both:
        raise ValueError(f"{where}: {both[0]} is both set and drawn from the space")
    return Method(
        name=name,
        changes=changes,
        space=tuple(Dimension.parse(key, dimension) for key, dimension in space.items()),
        baseline=bool(values.get("baseline", False)),
        settings_of=settings_of,
    )


def load(name_or_path: str | Path) -> Study:
    """A study by its name (in ``experiments/studies``) or by the path of its YAML file."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise FileNotFoundError(
            f"no study {str(name_or_path)!r}: expected a file or one of {names}"
        )
    return parse(path.read_text(), path.name)
