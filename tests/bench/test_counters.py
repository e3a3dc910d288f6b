"""Counters: which blocks stand for a grid, what limits see, and one small kernel from end to end."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import cli
from bench.counters import command, cuda_ptx, limits, measure, problems
from bench.counters.emulation import Missing

ROOT = Path(__file__).parents[2]


def row(**changed) -> dict:
    """As ``measure.describe`` makes it, of one launch."""
    figures = dict.fromkeys(limits.FIELDS, 2.0) | {"wavefronts": 1.0, "once_mb": 1.0}
    named = {"backend": "cuda", "kernel": "reduce", "precision": "bf16", "config": "tile 64"}
    named |= {"problem": "shift 3x3 64@56 b26", "target": 90, "chosen": True, "status": "ok"}
    rest = {"registers": 64, "binding": "L2", "fraction": 0.5}
    return {**named, **figures, **rest, **changed}


# --------------------------------------------------------------------------- which blocks


@pytest.mark.parametrize(("total", "count"), [(1, 5), (7, 7), (8, 7), (324, 83), (100_000, 400)])
def test_blocks_are_spread(total, count):
    chosen = measure.spread(total, count)
    assert len(set(chosen)) == len(chosen) == min(total, count)
    assert all(0 <= block < total for block in chosen)
    quarters = [sum(4 * block // total == q for block in chosen) for q in range(4)]
    assert max(quarters) - min(quarters) <= 1 or total < 16


def test_blocks_do_not_follow_a_period_of_the_grid():
    """A grid of tiles in rows of 18: all columns are met alike."""
    columns = [block % 18 for block in measure.spread(18 * 18, 72)]
    assert all(1 <= columns.count(column) <= 8 for column in range(18))


@dataclass
class Toy:
    """A launch of 1000 blocks of so many warp instructions each."""

    instructions: int
    products: int = 0
    grid: tuple = (10, 100)
    runs: list = field(default_factory=list)

    def run(self, blocks, **options):
        assert options["profile"]
        self.runs.append(len(blocks))
        executed = len(blocks) * self.instructions
        total = SimpleNamespace(warp_instructions=executed, mma_instructions=self.products)
        return SimpleNamespace(profile=SimpleNamespace(total=total, blocks=blocks))


@pytest.mark.parametrize(
    ("toy", "runs"),
    [
        (Toy(10**6, products=1), [measure.FEWEST]),
        (Toy(10**4, products=1), [measure.FEWEST, measure.PRODUCTS // 10**4]),
        (Toy(10**4), [measure.FEWEST, measure.OTHERS // 10**4]),
        (Toy(1), [measure.FEWEST, measure.MOST]),
        (Toy(1, grid=(2,)), [2]),
        (Toy(1, grid=(50,)), [measure.FEWEST, 50]),
    ],
    ids=str,
)
def test_more_blocks_are_run_of_cheap_launches(toy, runs):
    assert len(measure.profile(toy).blocks) == runs[-1]
    assert toy.runs == runs


def test_the_main_loop_is_what_runs_as_often_as_the_products():
    def line(kind, issued, requests=0, wavefronts=0):
        traffic = SimpleNamespace(requests=requests, wavefronts=wavefronts)
        return SimpleNamespace(kind=kind, issued=issued, traffic=traffic)

    prologue = [line("int", 4), line("st.shared", 4, 4, 32)]
    loop = [line("ldmatrix", 100, 400, 440), line("mma", 100), line("mma", 100), line("int", 50)]
    lines = measure.main_loop([*prologue, *loop])
    assert lines == loop
    assert measure.instructions_per_mma(lines) == 350 / 200
    assert measure.wavefronts(lines) == 1.1
    assert measure.wavefronts([*prologue, *loop]) == 472 / 404
    assert measure.instructions_per_mma(prologue) is None
    assert measure.wavefronts(loop[1:]) is None


# --------------------------------------------------------------------------- PTX

FINISH = "_ZN3dbp5stats19stats_finish_kernelILi256EEEvNS_11StatsParamsE"
PTX = f"""\
.version 9.0
.extern .shared .align 16 .b8 memory[];
.visible .entry {FINISH}(
	.param .b64 p
)
{{
	// begin inline asm
	{{
setp.ne.b32 %p1, 1, 0;
}}
	ret;
}}
	// .globl other
.visible .entry other(
	.param .b64 p
)
{{
	ret;
}}
"""


def test_one_kernel_is_cut_out_of_the_ptx_whole():
    first, second = (cuda_ptx.only(kernel, PTX) for kernel in (FINISH, "other"))
    assert first == PTX[: PTX.index(".visible .entry other")]
    assert "setp" not in second
    assert second.startswith(".version 9.0\n.extern")
    assert second.endswith(PTX[PTX.index(".visible .entry other") :])


def test_kernels_have_short_names():
    assert cuda_ptx.kernel_name(FINISH) == "stats_finish"
    assert cuda_ptx.kernel_name("_ZN3dbp4toysE") == "_ZN3dbp4toysE"


# --------------------------------------------------------------------------- limits


@pytest.fixture
def file(tmp_path):
    return tmp_path / "limits.json"


def test_limits_hold_what_they_were_written_from_and_little_more(file):
    measured = row(us=12.34, sectors=1.0, read_mb=0.0, instructions_per_mma=None)
    limits.write([measured], file)
    found = limits.read(file)
    assert limits.violations([measured], found) == []
    for name in ("us", "sectors", "read_mb", "loop_wavefronts"):
        worse = {**measured, name: 1.05 * measured[name] + 0.001}
        (problem,) = limits.violations([worse], found)
        assert f": {name} is " in problem
    (problem,) = limits.violations([{**measured, "instructions_per_mma": 3.0}], found)
    assert "instructions_per_mma is 3.0, limit None" in problem
    gone = {**measured, "loop_wavefronts": None}
    assert limits.violations([gone], found) == []


def test_rows_that_fail_or_have_no_limit_are_problems(file):
    limits.write([row()], file)
    found = limits.read(file)
    failed = row(status="failed", reason="MemoryFault: out of bounds")
    assert limits.violations([failed], found) == [
        f"{measure.key(row())}: MemoryFault: out of bounds"
    ]
    other = row(target=80)
    assert limits.violations([other], found) == [f"{measure.key(other)}: no committed limit"]
    gone = f"{measure.key(row())}: a limit, but no such row"
    assert limits.violations([], found, whole=True) == [gone]
    assert limits.violations([], found) == []


def test_limits_of_other_rows_are_kept_unless_all_were_run(file):
    first, second = row(), row(kernel="pack")
    limits.write([first], file)
    limits.write([second, row(kernel="stats", status="failed", reason="")], file)
    assert limits.read(file).rows.keys() == {measure.key(first), measure.key(second)}
    limits.write([second], file, whole=True)
    assert limits.read(file).rows.keys() == {measure.key(second)}


def test_another_compiler_is_not_held_to_limits(file, monkeypatch):
    monkeypatch.setattr(limits, "compilers", lambda: {"cuda": "13.0", "triton": "3.6.0"})
    limits.write([row(), row(backend="triton")], file)
    monkeypatch.setattr(limits, "compilers", lambda: {"cuda": "13.1", "triton": "3.6.0"})
    found = limits.read(file)
    worse = [row(us=9.0), row(backend="triton", us=9.0)]
    (problem,) = limits.violations(worse, found)
    assert problem.startswith("triton")
    (line,) = limits.uncompared(found)
    assert line == "cuda: compiled by 13.1, the limits are for 13.0: not compared"
    failed = row(status="failed", reason="why")
    assert len(limits.violations([failed], found)) == 1


def test_limits_of_other_figures_are_refused(file):
    limits.write([row()], file)
    file.write_text(file.read_text().replace("sectors", "vectors"))
    with pytest.raises(ValueError, match="vectors"):
        limits.read(file)


# --------------------------------------------------------------------------- tables


def test_tables_show_figures_failures_and_sums_of_calls():
    product = row(kernel="gram_shift", us=10.5, instructions_per_mma=5.43)
    other = row(kernel="gram_shift", config="tile 32", chosen=False, us=99.0)
    wrong = row(problem="stats", status="failed", reason="no")
    text = command.table([product, row(), other, wrong])
    assert "| 5.43 (2) " in text
    assert "| 50%" in text
    assert "| cuda    | shift 3x3 64@56 b26 bf16 | H100 | gram_shift, reduce | 12.5   |" in text
    assert "| cuda    | stats bf16               | H100 | reduce             | failed |" in text
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()}) == 1


def test_a_comparison_has_what_differs():
    before = [row(), row(target=80), row(kernel="pack", status="failed", reason="")]
    now = [row(us=1.0, fraction=None), row(target=80), row(kernel="pack")]
    text = command.comparison(now, before)
    assert text.count("sm_90") == 3
    assert "sm_80" not in text
    assert "| us       | 2      | 1   | 0.50       |" in text
    assert f"{measure.key(row(kernel='pack'))}: only now" in text


# --------------------------------------------------------------------------- what is run


def test_every_kernel_is_among_the_quick_problems_and_names_are_unique():
    found = problems.problems()
    names = [(p.backend, p.precision, p.name) for p in found]
    assert len(set(names)) == len(names)
    forms = {(p.backend, p.name.split()[0]) for p in found}
    assert forms == {(p.backend, p.name.split()[0]) for p in found if p.quick}


def test_what_is_asked_for():
    every = command.Selection()
    assert every.whole
    assert not command.Selection(targets=(80,)).whole
    assert not command.Selection(kernel="pack").whole
    assert {target for _, target in every.jobs()} == set(problems.TARGETS)
    sm90 = [target for problem, target in every.jobs() if problem.name.startswith("sm90")]
    assert set(sm90) == {90}
    jobs = command.Selection("cuda", None, "^pack", (80,), True).jobs()
    assert [problem.name for problem, _ in jobs] == ["pack 3x3 64@56 b26"]
    assert command.Selection(kernel="gram_.*|pack").counts("gram_box")
    assert not command.Selection(kernel="reduce").counts("decor_stats_reduce")


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("target", problems.TARGETS)
def test_every_shipped_configuration_of_triton_is_counted(target, monkeypatch):
    from dbp_kernels.backends.triton import configs

    monkeypatch.setattr(measure, "multiprocessors", lambda target: 100)
    monkeypatch.setattr(command, "record", lambda make, target: {"status": "ok"})
    selection = command.Selection("triton", targets=(target,))
    rows = [r for job in selection.jobs() for r in command.Rows(*job, selection).run()]
    assert all(r["status"] == "ok" for r in rows), rows
    counted = {(r["kernel"], r["precision"], r["config"]) for r in rows}
    for kernel, shipped in configs._family(target).items():
        if kernel == "gram_shift_tma" and target < 90:  # shipped, and never used
            continue
        for precision in shipped.keys() - {"fp16"}:
            for c in shipped[precision]:
                sides = (
                    [c.block_m, c.block_n, c.block_k]
                    if kernel == "product"
                    else [c.block_m, c.block_k]
                )
                text = f"{'x'.join(map(str, sides))} w{c.num_warps} s{c.num_stages}"
                assert (kernel, precision, text) in counted


@pytest.mark.skipif(not command.RESULT.exists(), reason="no result is committed")
def test_the_committed_result_is_whole_and_within_its_limits():
    result = json.loads(command.RESULT.read_text())
    assert result["complete"]
    assert result["settings"]["whole"]
    assert not limits.violations(result["counters"], limits.read(), whole=True)


def problem(*calls) -> problems.Problem:
    return problems.Problem("cuda", "bf16", "toy", lambda target: iter(calls))


@pytest.fixture
def stubbed(monkeypatch):
    """Launches are those that calls make of ``started``; nothing is simulated."""
    holder = SimpleNamespace()

    class StandIn:
        def __init__(self, backend, target, started):
            holder.started = started

        def __enter__(self):
            return None

        def __exit__(self, *failure):
            return None

    monkeypatch.setattr(command, "stand_in", StandIn)
    monkeypatch.setattr(command, "record", lambda make, target: {"status": "ok", **make()})
    return lambda *names: [holder.started(name, "tile", dict) for name in names]


def test_rows_are_those_of_the_launches_that_count(stubbed):
    toy = problem(
        problems.Call(lambda: stubbed("pack", "gram", "pack")),
        problems.Call(lambda: stubbed("pack", "gram", "other"), "other"),
    )

    def found(**asked):
        rows = command.Rows(toy, 80, command.Selection(**asked)).run()
        return [(r["kernel"], r["config"], r["chosen"]) for r in rows]

    first = [("pack", "tile", True), ("gram", "tile", True), ("pack", "tile #2", True)]
    assert found() == [*first, ("other", "tile", False)]
    assert found(quick=True) == first
    assert found(kernel="gram") == [first[1]]


def test_a_call_that_raises_costs_itself_alone(stubbed, monkeypatch):
    def broken():
        stubbed("gram")
        raise RuntimeError("does not fit")

    toy = problem(problems.Call(broken), problems.Call(lambda: stubbed("other")))
    gram, failure, other = command.Rows(toy, 80, command.Selection()).run()
    assert gram["status"] == other["status"] == "ok"
    assert failure["status"] == "failed"
    assert failure["reason"] == "RuntimeError: does not fit"

    def no_inputs(target):
        raise MemoryError

    toy = problems.Problem("cuda", "bf16", "toy", no_inputs)
    (failure,) = command.Rows(toy, 80, command.Selection()).run()
    assert failure["reason"] == "MemoryError: "

    def missing():
        raise Missing("no compiler")

    with pytest.raises(Missing):
        command.Rows(problem(problems.Call(missing)), 80, command.Selection()).run()


def test_a_launch_that_faults_is_a_row():
    def faults():
        raise ValueError("the block does not fit an SM")

    assert measure.record(faults, 80)["reason"] == "ValueError: the block does not fit an SM"


# --------------------------------------------------------------------------- the command


def test_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ptxsim", None)
    assert cli.main(["counters", "--kernel", "pack"]) == 2
    assert "no package ptxsim on PYTHONPATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--problem", "("], "regular expression"),
        (["--against", "nowhere.json"], "nowhere.json"),
        (["--against", str(ROOT / "bench" / "results" / "host-time.json")], "not a result that"),
        (["--problem", "nothing", "--backend", "cuda"], "no launch matches"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(command, "_ready", lambda selection, save: None)
    assert cli.main(["counters", *arguments]) == 2
    assert said in capsys.readouterr().err


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench", "counters", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.ptx
@pytest.mark.skipif(not importlib.util.find_spec("ptxsim"), reason="ptxsim is not installed")
def test_a_small_kernel_from_end_to_end(tmp_path):
    """The copies that make rows of channels, of both backends: known bytes, limits, comparison."""
    saved, own = tmp_path / "result.json", tmp_path / "limits.json"
    asked = ["--kernel", "pack", "--problem", "^pack", "--quick", "--target", 80, "--limits", own]
    first = run(*asked, "--save", saved, "--write-limits")
    if first.returncode == 2:
        pytest.skip(first.stderr.strip().splitlines()[-1])
    assert first.returncode == 0, first.stdout + first.stderr
    result = json.loads(saved.read_text())
    assert not result["settings"]["whole"]
    assert {r["backend"] for r in result["counters"]} == {"cuda", "triton"}
    for found in result["counters"]:
        assert found["status"] == "ok", found
        megabytes = 26 * 64 * 56 * 56 * 2 / 1e6
        assert found["written_mb"] == pytest.approx(megabytes, rel=0.01)
        assert found["read_mb"] >= 0.99 * megabytes
        assert found["bounds_us"]["HBM"] == pytest.approx(2 * megabytes / 2.039, rel=0.05)
    again = run(*asked, "--save", saved)
    assert again.returncode == 2
    assert "not overwritten" in again.stderr
    content = json.loads(own.read_text())
    name = next(iter(content["rows"]))
    content["rows"][name][-1] /= 2
    own.write_text(json.dumps(content))
    worse = run(*asked, "--against", saved)
    assert worse.returncode == 1
    assert f"{name}: us is " in worse.stdout
