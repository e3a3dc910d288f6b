"""Results as a benchmark run saves them, with figures made up by a test."""

from __future__ import annotations

from bench.core import bars, registry
from bench.suites import regret
from dbp_kernels.tools import timing


def seconds(median: float, samples: int = 9) -> dict:
    return timing.Spread(median, median, median, median, median, samples).as_dict()


def method(median: float, extra: int = 0, samples: int = 9) -> dict:
    return {"status": "ok", "seconds": seconds(median, samples), "extra_bytes": extra}


def synthetic(speedup: float = 7.0, slowdown: float = 1.05, extra: int = 100) -> dict:
    cases = []
    for case in registry.all_cases():
        methods = {
            "dbp": method(0.01, extra),
            "unfold": method(0.01 * speedup),
            "self_wgrad": {"status": "n/a", "reason": "stride above 1"},
        }
        if not case.is_linear and case.stride == (1, 1):
            methods["self_wgrad"] = method(0.02)
        record = {"name": case.name, "n": case.n, "D": case.D, "groups": case.groups}
        record.update(kernel=list(case.kernel), stride=list(case.stride), methods=methods)
        record["input_elements"] = case.input_elements
        cases.append(record)
    step = {"bp": method(0.2, samples=25), "dbp": method(0.2 * slowdown, samples=25)}
    step["published"] = method(0.6, samples=25)
    networks = ("convnet 32x32 b128", "resnet18 32x32 b128")
    return {
        "command": "python -m bench --suite all",
        "machine": {"commit": "0" * 40, "dirty": False, "cpu": "c", "threads": 2, "torch": "2"},
        "settings": {"device": "cpu", "dtype": "float32", "whole_registry": True},
        "kernels": cases,
        "step": [{"name": name, "sample": 0.1, "methods": dict(step)} for name in networks],
        "passes": [
            {
                "name": name,
                "methods": {m: method(0.1, samples=25) for m in ("bp", "dbp")},
                "step": {},
            }
            for name in networks
        ],
        "budget": [shared(name, 1.1) for name in networks],
        "regret": [predicted(question, 0.0) for question in regret.QUESTIONS for _ in range(10)],
    }


def predicted(question: str, by: float, samples: int = 9) -> dict:
    """The record of a choice whose regret is ``by``."""
    methods = {"chosen": method(0.01 * (1 + by), samples=samples), "other": method(0.01)}
    record = {"name": "case", "question": question, "n": 1, "D": 1, "methods": methods}
    return {**record, "predicted": "chosen", "best": "other", "regret": by}


def shared(name: str, by: float, steps: int = 30) -> dict:
    """A budget's record of a network ("... b128") with shares ``by`` times the requested ones."""
    runs = [{"budget": b, "share": by * b} for b in bars.BUDGETS]
    runs.append({"budget": None, "share": 0.5})
    for run in runs:
        run.update(step_seconds=0.1, longest_update=0.1, seconds=[0.0, 1.0], loss=[1.0, 0.5])
    network, batch = name.rsplit(" b", 1)
    record = {"name": name, "network": network, "batch": int(batch), "lr": 1e-3, "runs": runs}
    return {**record, "warm_up": 5, "steps": steps}


def statuses(result: dict) -> dict[str, str]:
    return {v.bar.text: v.status for v in bars.evaluate(result)}
