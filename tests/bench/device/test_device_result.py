"""The result of a device check: a line a case at once, and from the lines a file like other results."""

import json

import pytest

from bench.core import bars
from bench.device.result import Result, merge
from bench.device.summary import summary


def layer(method: str, ms: float, **more) -> dict:
    times = {"status": "ok", "seconds": {"median": ms / 1e3, "samples": 9}}
    return {"name": "3x3 64@56 b26", "D": 576, "methods": {method: times}, **more}


@pytest.fixture
def result(tmp_path):
    header = {"settings": {"device": "cuda"}, "machine": {"commit": "given"}}
    return Result(header, tmp_path / "gpu-1.5")  # a dot is no suffix


def test_methods_on_one_problem_become_one_record():
    content: dict = {}
    merge(content, {"kernels": [layer("dbp", 1.0, n=5)]})
    merge(content, {"kernels": [layer("unfold", 4.0, n=6), layer("dbp", 9.0)]})
    merge(content, {"kernels": [{**layer("dbp", 1.0), "name": "another"}]})
    first, second = content["kernels"]
    assert set(first["methods"]) == {"dbp", "unfold"}
    assert first["n"] == 5
    assert bars.speedup(first, "unfold") == 4.0  # the first figure of a method stands
    assert second["name"] == "another"


def test_a_family_adds_to_what_the_record_has():
    content = {"kernels": [layer("dbp", 1.0)]}
    for family in ("triton", "cuda"):
        merge(content, {"kernels": [{**layer("x", 1.0), "methods": {}, "backends": {family: {}}}]})
    (record,) = content["kernels"]
    assert set(record["methods"]) == {"dbp"}
    assert set(record["backends"]) == {"triton", "cuda"}


def test_tables_grow_entry_by_entry():
    content: dict = {}
    for n in (1, 2):
        merge(content, {"tuned": {"capability": 90, "pinned": {"k": {"bf16": [{"sizes": n}]}}}})
    assert content["tuned"]["capability"] == 90
    assert [e["sizes"] for e in content["tuned"]["pinned"]["k"]["bf16"]] == [1, 2]


def test_what_the_header_says_stands(result):
    found = {"machine": {"commit": "found", "gpu": "H"}}
    result.add("describe", {"case": "machine", "status": "passed", "result": found})
    assert result.content["machine"] == {"commit": "given", "gpu": "H"}


def test_every_case_is_a_line_at_once(result):
    for n, status in enumerate(("passed", "hung")):
        result.add("one", {"case": f"c{n}", "status": status, "result": {"kernels": []}})
        lines = [json.loads(line) for line in result.lines.read_text().splitlines()]
        assert len(lines) == n + 1
        assert lines[-1]["case"] == f"c{n}"
        assert lines[-1]["result"] == {"kernels": []}
        saved = json.loads(result.path.read_text())
        assert saved["checks"]["one"]["cases"][n] == {"case": f"c{n}", "status": status}
    assert result.path.name == "gpu-1.5.json"


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["passed", "passed"], "passed"),
        (["passed", "skipped"], "passed"),
        (["skipped"], "skipped"),
        ([], "skipped"),
        (["passed", "not run"], "cut short"),
        (["passed", "not run", "crashed"], "failed"),
        (["out of memory"], "failed"),
    ],
)
def test_a_stage_is_summed_up(result, statuses, expected):
    for n, status in enumerate(statuses):
        result.add("one", {"case": f"c{n}", "status": status})
    assert result.close_stage("one", 1.0) == expected
    assert sum(result.content["checks"]["one"]["outcomes"].values()) == len(statuses)


def test_the_summary_names_what_went_wrong(result):
    wrong = {"case": "cuda: x", "status": "hung", "reason": "no result"}
    result.add("layers", wrong)
    result.add("layers", {"case": "triton: x", "status": "passed"})
    result.close_stage("layers", 3.0)
    machine = {"dirty": False, "gpu": "H200", "torch": "2.11"}
    result.content.update(machine={**machine, "commit": "0" * 40}, command="bench", kernels=[])
    result.content["settings"].update(dtype="bfloat16")
    text = summary(result.content)
    assert "layers: cuda: x: hung: no result" in text
    assert "1 hung, 1 passed" in text
