"""Benchmark suite "scaling", the machine's peaks and the roofline."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from bench_results import method

from bench import cli
from bench.core import machine, registry, report
from bench.rivals import Rival, dense
from bench.suites import kernels, scaling


def test_sweeps_change_one_size_of_the_base_layer():
    for device, base in scaling.BASE.items():
        cases = list(scaling.sweep_cases(device))
        assert len(cases) == sum(map(len, scaling.SWEEPS.values()))
        for what, value, case in cases:
            sizes = {"batch": case.N, "image": case.H, "channels": case.C, "kernel": case.kernel[0]}
            assert sizes == {**base, what: value}


def test_exponents_of_neighbours():
    def point(sweep: str, n: int, D: int, ms: float) -> dict:
        record = {"sweep": sweep, "value": n, "n": n, "D": D, "predicted_seconds": ms / 500}
        return {**record, "methods": {"dbp": method(ms / 1e3), "unfold": method(ms / 1e2)}}

    points = [point("batch", 10, 5, 1), point("batch", 20, 5, 4), point("kernel", 20, 10, 9)]
    table = scaling.scaling_table([*points, point("kernel", 20, 20, 18)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    column = dict(zip(lines[0], zip(*lines[2:], strict=True), strict=True))
    assert column["grows"] == ("-", "n^2.00", "-", "D^1.00")
    assert column["predicted/ours"] == ("2.00",) * 4
    assert column["unfold x"] == ("10.00",) * 4


def test_rates_against_what_the_machine_can_do():
    record = {"useful_gflop": 4.0, "useful_bytes": 10**9, "methods": {"dbp": method(0.5)}}
    record["methods"]["self_wgrad"] = {"status": "n/a", "reason": "stride"}
    machine.add_fractions(record, {"gemm_tflops": 0.1, "copy_gbytes": 8.0})
    ours = record["methods"]["dbp"]
    assert ours["useful_tflops"] == pytest.approx(0.008)
    assert ours["of_peak"] == pytest.approx(0.08)
    assert ours["of_copy"] == pytest.approx(0.25)
    assert "of_peak" not in record["methods"]["self_wgrad"]


def test_useful_bytes_are_input_and_result():
    case = registry.conv(2, 2, 5, 3)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        record = kernels.run_case(case, kernels.Settings(dtype=dtype, pairs=1, warmup=1))
        assert record["useful_bytes"] == size * case.input_elements + 4 * case.D**2


def test_inputs_rotate_through_more_than_the_cache(monkeypatch):
    case = registry.conv(2, 2, 5, 3)
    x = torch.randn(case.input_shape)
    size = x.numel() * 4
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 5 * size)
    inputs = kernels.rotation(x.to(memory_format=torch.channels_last))
    assert len(inputs) * size > 5 * size
    assert len({tensor.data_ptr() for tensor in inputs}) == len(inputs) == 6
    assert all(torch.equal(tensor, x) and tensor.stride(1) == 1 for tensor in inputs)
    seen: list[int] = []

    def compute(tensor, case):
        seen.append(tensor.data_ptr())
        return dense.unfold_matmul(tensor, case)

    methods = {"dbp": Rival("recorder", compute, lambda case: "")}
    record = kernels.run_case(case, kernels.Settings(pairs=1, warmup=1), methods)
    assert record["inputs"] == 6
    timed = seen[2:]  # after the check and the weighing
    assert all(a != b for a, b in itertools.pairwise(timed))
    assert len(set(timed)) == min(6, len(timed))


def test_the_cache_has_a_size():
    assert 2**18 < machine.cache_bytes(torch.device("cpu")) < 2**34


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(scaling.BASE, "cpu", {"batch": 2, "image": 7, "channels": 4, "kernel": 3})
    monkeypatch.setattr(machine, "COPY_BYTES", 2**20)
    target = tmp_path / "scaling.json"
    options = ["--suite", "scaling", "--filter", "^(batch|image)", "--pairs", "2", "--save"]
    assert cli.main([*options, str(target)]) == 0
    result = json.loads(target.read_text())
    assert [r["value"] for r in result["scaling"] if r["sweep"] == "image"] == [7, 14, 28, 56, 112]
    for record in result["scaling"]:
        assert record["predicted_seconds"] > 0
        assert record["methods"]["dbp"]["of_peak"] > 0
    assert result["peaks"]["gemm_tflops"] > 0
    assert "as one size grows" in capsys.readouterr().out
    assert cli.main(["report", str(target)]) == 0
    assert target.with_suffix(".png").stat().st_size > 10_000


def test_kernels_come_with_a_roofline(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "COPY_BYTES", 2**20)
    target = tmp_path / "kernels.json"
    options = ["--filter", "^3x3 3@32|^1x1 64@56", "--batch", "1", "--pairs", "2", "--save"]
    assert cli.main([*options, str(target)]) == 0
    result = json.loads(target.read_text())
    assert {r["methods"]["dbp"]["status"] for r in result["kernels"]} == {"ok"}

    assert len(list(kernels.SUITE.panels(result))) == 2  # speed-ups and roofline
    assert report.plot(result, tmp_path / "k.png")
