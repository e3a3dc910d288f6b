"""``python -m dbp_kernels calibrate``: a file that the planner reads, in a clone and without one."""

import json
import subprocess
import sys
import time

import pytest
import torch

from dbp_kernels import __main__
from dbp_kernels.planning import calibration
from dbp_kernels.tools import calibrate, origin, timing


def run(*arguments: object) -> int:
    return __main__.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("arguments", [[], ["--save"]])
def test_an_installed_package_writes_into_the_current_folder(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(origin, "clone", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert run("calibrate", "--quick", "--threads", 1, *arguments) == 0
    (path,) = tmp_path.iterdir()
    printed = capsys.readouterr().out
    assert f"saved {path}" in printed
    assert f"{calibration.VARIABLE}={path} " in printed
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    read = calibration.read(path, "it")
    calibration.calibration.cache_clear()
    try:
        assert calibration.calibration("cpu") == read
    finally:
        calibration.calibration.cache_clear()
    assert json.loads(path.read_text())["origin"]["commit"] is None


def test_a_clone_writes_only_when_asked_and_then_into_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "FOLDER", tmp_path / "package")
    assert run("calibrate", "--quick") == 0
    assert not list(tmp_path.iterdir())
    assert run("calibrate", "--quick", "--save") == 0
    assert calibration.VARIABLE not in capsys.readouterr().out
    (path,) = (tmp_path / "package").iterdir()
    assert json.loads(path.read_text())["origin"]["commit"] == origin.commit(origin.clone())


def test_cpu_time_is_for_one_thread(capsys):
    assert run("calibrate", "--cpu-time", "--threads", 2) == 2
    assert "--threads 1" in capsys.readouterr().err


def test_the_tools_need_nothing_that_comes_with_a_clone():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['bench', 'experiments', 'matplotlib', 'tqdm'])); "
        "from dbp_kernels.__main__ import main; from dbp_kernels.tools import tune; "
        "tune.shapes(); sys.exit(main(['calibrate', '--quick']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)["figures"]) >= {"product", "pack", "im2col"}


def test_a_quick_calibration_is_a_calibration(tmp_path, capsys):
    target = tmp_path / "cpu.json"
    assert run("calibrate", "--quick", "--threads", 1, "--save", target) == 0
    assert f"saved {target}" in capsys.readouterr().out
    read = calibration.read(target, "it")
    assert (read.type, read.threads, read.measured) == ("cpu", 1, True)
    assert read.device == calibration.cpu_name()
    assert read.machine.product_rate(64) > 0
    of = json.loads(target.read_text())["origin"]
    assert of["command"].startswith("python -m dbp_kernels calibrate --quick --threads 1")
    before = target.read_text()
    assert run("calibrate", "--quick", "--save", target) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert target.read_text() == before
    assert run("calibrate", "--quick", "--threads", 1, "--save", target, "--overwrite") == 0
    assert calibration.read(target, "it").machine != read.machine


@pytest.mark.parametrize("after", ["some figures", "all figures"])
def test_an_interrupted_calibration_is_kept_once_it_has_every_figure(
    after, tmp_path, monkeypatch, capsys
):
    names = list(calibrate.parts("cpu"))
    wanted = names[:3] if after == "some figures" else [*names, *names[:2]]

    def figures(meter, keep):
        for n, name in enumerate(wanted):
            keep({name: float(n)})
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "figures", figures)
    target = tmp_path / "cpu.json"
    status = run("calibrate", "--quick", "--save", target)
    assert "interrupted" in capsys.readouterr().err
    if after == "some figures":
        assert (status, target.exists()) == (1, False)
    else:
        assert status == 0
        assert set(json.loads(target.read_text())["figures"]) == set(names)


def test_parts_by_themselves_have_the_figures_of_all():
    meter = calibrate.Meter(torch.device("cpu"), quick=True)
    whole = calibrate.figures(meter)
    parts = [calibrate.part_figures(name, meter) for name in calibrate.parts("cpu")]
    assert set(whole) == {key for part in parts for key in part}
    assert all(factor >= 1 for part in parts for factor in part.get("aliased", ()))


def test_of_several_passes_the_best_figures_count():
    one = {
        "product": [[1, 2.0], [3, 4.0]],
        "gbytes": 5.0,
        "call": 2.0,
        "pack": [[[1, 2.0]], [[1, 3.0]]],
    }
    two = {
        "product": [[1, 3.0], [3, 1.0]],
        "gbytes": 6.0,
        "call": 1.0,
        "pack": [[[1, 1.0]], [[1, 4.0]]],
    }
    best = {
        "product": [[1, 3.0], [3, 4.0]],
        "gbytes": 6.0,
        "call": 1.0,
        "pack": [[[1, 1.0]], [[1, 3.0]]],
    }
    assert calibrate._better(one, two) == best


def test_a_calibration_is_named_after_its_device():
    content = {"device": "AMD EPYC(tm) 1.2", "type": "cpu", "threads": 4}
    assert calibrate.file_name(content) == "amd-epyc-tm-1-2-4-threads.json"
    content = {"device": "NVIDIA H200", "type": "cuda", "threads": 1}
    assert calibrate.file_name(content) == "nvidia-h200.json"


def test_cpu_time_is_not_spent_asleep():
    with timing.cpu_time():
        asleep = timing.time_once(lambda: time.sleep(0.1), torch.device("cpu"))
    assert asleep < 0.05
    assert timing.time_once(lambda: time.sleep(0.1), torch.device("cpu")) > 0.09
