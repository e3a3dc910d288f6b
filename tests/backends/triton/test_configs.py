"""Tile shapes per GPU: every target has its own, what is pinned is shipped, the tuner writes them."""

import json
from dataclasses import asdict

import pytest
import torch

from bench.core import registry
from dbp_kernels.backends import prepared
from dbp_kernels.backends.triton import configs, product, runtime
from dbp_kernels.backends.triton.configs import Config, precision_key
from dbp_kernels.tools import tune

CPU = torch.device("cpu")
SMALL, LARGE = Config(16, 16, 16, 4, 2), Config(64, 64, 32, 4, 3)


def test_every_target_has_configurations():
    for target in runtime.TARGETS:
        for kernel, by_precision in configs._family(target).items():
            for precision, shipped in by_precision.items():
                assert precision in ("bf16", "fp16", "tf32", "tf32x3", "ieee")
                assert configs.configs(kernel, precision, target) == shipped
                assert len(set(shipped)) == len(shipped) > 0
                sizes = [c.block_m * c.block_n for c in shipped]
                assert sizes == sorted(sizes, reverse=True), (kernel, precision)


def test_families_never_hand_down_more_shared_memory_than_there_is():
    tiles = {target: configs._family(target) for target in runtime.TARGETS}
    assert tiles[86] == tiles[89] == tiles[120]
    assert tiles[90] == tiles[100]
    assert tiles[80] != tiles[90]


@pytest.mark.parametrize("target", [75, 87, 103, 121, 130])
def test_unknown_targets_take_a_family_that_fits(target):
    assert configs._family(target)


def test_precision_follows_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert precision_key(torch.float32) == expected
            assert precision_key(torch.bfloat16) == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_pinned_configurations_are_among_the_shipped():
    for entry in configs._files():
        for kernel, by_precision in entry.get("pinned", {}).items():
            for precision, rows in by_precision.items():
                shipped = configs.configs(kernel, precision, entry["capability"])
                assert {Config(**row["config"]) for row in rows} <= set(shipped)


@pytest.fixture
def pinned_files(monkeypatch):
    """Two GPUs of one capability with measured configurations, and one of another."""

    def entry(device, capability, config):
        rows = [{"sizes": {"C": 64, "n": 1000}, "config": asdict(config), "seconds": {"x": 2.0}}]
        return {"device": device, "capability": capability, "pinned": {"k": {"bf16": rows}}}

    files = (entry("H200", 90, LARGE), entry("H100", 90, SMALL), entry("A100", 80, SMALL))
    monkeypatch.setattr(configs, "_files", lambda: files)
    configs._nearest.cache_clear()
    yield
    configs._nearest.cache_clear()


def nearest(name, target, C=64, n=1000, kernel="k"):
    entry = configs._nearest(kernel, "bf16", (("C", C), ("n", n)), name, target)
    return Config(**entry["config"]) if entry else None


@pytest.mark.usefixtures("pinned_files")
def test_nearest_match():
    assert nearest("H200", 90) == LARGE
    assert nearest("H100", 90) == SMALL
    assert nearest("GH200", 90) == LARGE  # another GPU of the capability
    assert nearest("L40", 89) is None
    assert nearest("H200", 90, n=3000) == LARGE
    assert nearest("H200", 90, n=5000) is None  # too far to say
    assert nearest("H200", 90, C=128, n=1500) == LARGE
    assert nearest("H200", 90, C=128, n=3000) is None
    assert nearest("H200", 90, kernel="other") is None


def problem(delays: dict, wrong=()):
    def run(config):
        for _ in range(delays[config]):
            torch.randn(200, 200) @ torch.randn(200, 200)
        return torch.ones(3) * (2 if config in wrong else 1)

    sizes = {"C": 64, "n": 1000}
    return tune.Problem("k", "bf16", sizes, tuple(delays), run, lambda: torch.ones(3))


def test_the_tuner_finds_the_fastest_and_writes_what_the_package_reads(tmp_path, monkeypatch):
    table, failures = tune.tune([problem({LARGE: 8, SMALL: 1})], CPU)
    assert not failures
    path = tune.write(table, "NVIDIA H200", 90, tmp_path)
    assert path.name == "nvidia-h200.json"
    monkeypatch.setattr(configs, "_files", lambda: (json.loads(path.read_text()),))
    configs._nearest.cache_clear()
    assert nearest("NVIDIA H200", 90) == SMALL
    configs._nearest.cache_clear()


def test_the_table_is_kept_after_every_problem_and_when_interrupted():
    def interrupted(config):
        raise KeyboardInterrupt

    kept = []
    one = problem({LARGE: 2, SMALL: 1})
    endless = tune.Problem("k", "bf16", {}, (LARGE,), interrupted, lambda: torch.ones(3))
    keep = lambda table: kept.append(len(table["k"]["bf16"]))  # noqa: E731
    table, failures = tune.tune([one, one, endless, one], CPU, keep)
    assert kept == [1, 2]
    assert len(table["k"]["bf16"]) == 2
    assert failures == ["interrupted"]


def test_shapes_have_names_of_their_own_and_the_telling_ones_first():
    names = [shape.name for shape in tune.shapes()]
    assert len(set(names)) == len(names)
    assert names[0] == "gram_shift bf16: 3x3 64@56 b26"
    precisions = [name.split()[1] for name in names]
    assert set(precisions) == {"bf16:", "tf32:", "tf32x3:", "ieee:", "fp16:"}
    assert set(precisions[:20]) == {"bf16:", "tf32:"}
    assert not any("cifar" in name or "@32 " in name for name in names if "gram" in name)


def test_wrong_configurations_are_not_pinned():
    best, seconds = tune.fastest(problem({LARGE: 8, SMALL: 1}, wrong=[SMALL]), CPU)
    assert best == LARGE
    assert list(seconds) == [LARGE.text]
    with pytest.raises(RuntimeError, match="error"):
        tune.fastest(problem({SMALL: 1}, wrong=[SMALL]), CPU)


def test_the_tuner_refuses_during_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in tune.refuse()


def small_problems(dim: int) -> list[tune.Problem]:
    """As they are on a GPU, of small layers."""
    found = []
    for case in (registry.conv(1, 9, 4, 3, padding=0), registry.conv(2, 20, 3, 1)):
        for precision in ("bf16", "tf32"):
            found += [shape.make(CPU) for shape in tune.gram_shapes(case, precision)]
    found.append(tune._stats_problem("ieee", registry.conv(2, 3, 5, 3), CPU))
    found += [tune._update_problem(p, 2, dim, CPU) for p in ("tf32", "tf32x3")]
    found.append(tune._product_problem(2, dim + 5, dim + 16, dim, CPU))
    found = list(filter(None, found))
    kernels = {"gram_shift", "gram_shift_tma", "gram_direct", "decor_stats"}
    assert {p.kernel for p in found} == kernels | {"symmetric_update", "product"}
    return found


def test_every_kernel_takes_what_the_tuner_pins(monkeypatch):
    monkeypatch.setattr(product, "_WORTH", 0)  # of products so small, that the kernel takes them
    monkeypatch.setattr(product, "_THIN", 0)
    started, pinned = [], {}
    monkeypatch.setattr(configs, "_measured", lambda k, p, s, device: pinned.get((k, p, str(s))))

    def start(kernel, grid, arguments, num_warps, num_stages):
        tile = arguments.get("BLOCK", arguments.get("BLOCK_M"))
        if "SQUARE" not in arguments and tile:  # no reduction, no packing
            started.append((tile, num_warps, num_stages))

    runtime.simulate(runtime.Simulator(90, start))
    try:
        for p in small_problems(64):
            assert len(p.candidates) > 1
            for best in p.candidates:
                pinned[p.kernel, p.precision, str(p.sizes)] = {"config": asdict(best)}
                prepared.forget()
                p.run(None)
                assert started.pop() == (best.block_m, best.num_warps, best.num_stages), p.kernel
                assert not started
    finally:
        runtime.simulate(None)


@pytest.mark.skipif(not runtime.INTERPRET, reason="needs CPU tensors")
def test_tuning_problems_run():
    """Every candidate computes its result."""
    found = small_problems(24)
    for p in found:
        assert p.candidates
        exact = p.exact()
        for config in p.candidates:
            assert tune.error(p.run(config), exact) < 1e-2, (p.kernel, config)
