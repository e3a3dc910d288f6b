"""Calibrations: the files shipped, which one a device takes, the override, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dbp_kernels import info
from dbp_kernels.planning import calibration, choice, planner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def override(monkeypatch):
    """Sets DBP_CALIBRATION for the test, and makes the planner ask again before and after."""

    def use(path) -> None:
        monkeypatch.setenv(calibration.VARIABLE, str(path))
        planner.reset()

    yield use
    monkeypatch.undo()
    planner.reset()


def content(**changes) -> dict:
    """A shipped calibration of a CPU as plain data, with changed figures."""
    folder = calibration.files(calibration.__package__).joinpath("calibrations")
    known = next(c for c in calibration.shipped() if c.type == "cpu")
    data = json.loads(folder.joinpath(known.source).read_text())
    data["figures"].update(changes)
    return data


def saved(tmp_path, data) -> object:
    path = tmp_path / "mine.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_the_shipped_files_say_where_they_come_from():
    assert {c.type for c in calibration.shipped()} == set(calibration.TYPES)
    folder = calibration.files(calibration.__package__).joinpath("calibrations")
    for known in calibration.shipped():
        data = json.loads(folder.joinpath(known.source).read_text())
        assert data["device"]
        assert data["capability"]
        if known.measured:
            assert data["origin"]["command"].startswith(
                ("python -m bench ", "python -m dbp_kernels ")
            )
            assert {"date", "torch", "commit"} <= data["origin"].keys()
        else:
            assert "guess" in data["origin"]["note"]
            assert "not measured" in known.text


def test_the_figures_of_gpus_are_marked_as_guesses():
    default = next(c for c in calibration.shipped() if c.source == calibration.DEFAULT)
    assert not default.measured


def known(type="cpu", device="a", capability="AVX2", threads=2, source="x.json"):
    one = next(c for c in calibration.shipped() if c.type == type)
    named = {"device": device, "capability": capability, "threads": threads, "source": source}
    return replace(one, type=type, **named)


def test_the_nearest_calibration():
    files = (
        known(device="a", threads=2, source="a2"),
        known(device="a", threads=16, source="a16"),
        known(device="b", capability="AVX512", threads=8, source="b8"),
        known("cuda", "gpu", "9.0", 1, "gpu"),
        known("cuda", "guess", "9.0", 1, calibration.DEFAULT),
    )

    def chosen(*device) -> str:
        return calibration.nearest(files, *device).source

    assert chosen("cpu", "a", "AVX2", 2) == "a2"
    assert chosen("cpu", "a", "AVX2", 12) == "a16"
    assert chosen("cpu", "a", "AVX512", 2) == "a2"  # the same device before all else
    assert chosen("cpu", "other", "AVX512", 2) == "b8"
    assert chosen("cpu", "other", "NEON", 64) == "a16"
    assert chosen("cuda", "gpu", "9.0", 1) == "gpu"
    assert chosen("cuda", "sibling", "9.0", 1) == "gpu"
    assert chosen("cuda", "other", "8.0", 1) == calibration.DEFAULT
    assert chosen("cuda", "", "", 1) == calibration.DEFAULT


def test_how_libraries_compare_is_known_of_the_same_maker_only():
    one = known(device="AMD EPYC")
    own = replace(one.machine, narrow=((4, 10.0), (64, 100.0)), onednn=((4, 20.0), (64, 90.0)))
    files = (replace(one, machine=own),)
    for device in ("AMD EPYC", "AMD Ryzen 9", "Intel(R) Xeon(R)", ""):
        found = calibration.nearest(files, "cpu", device, "AVX2", 2).machine
        assert found.onednn_pays == device.startswith("AMD")  # sqrt(2 * 0.9) = 1.34 in the mean
        assert found.narrow_rate(4) == (20e9 if found.onednn_pays else 10e9)
        assert found.narrow_rate(4, blas=True) == 10e9
        assert found.product == own.product


def test_a_cpu_takes_its_makers_figures_before_others_of_its_capability():
    files = (
        known(device="AMD EPYC", capability="AVX512", source="a"),
        known(device="Intel(R) Xeon(R) 8175M", capability="AVX2", threads=16, source="i"),
    )
    for device, source in (("Intel(R) Core(TM) i7", "i"), ("AMD Ryzen", "a"), ("Neoverse", "a")):
        assert calibration.nearest(files, "cpu", device, "AVX512", 2).source == source


def test_float64_is_not_multiplied_by_onednn():
    assert not calibration.machine("cpu", itemsize=8).onednn_pays


def test_every_device_type_is_answered():
    threads = torch.get_num_threads()
    assert calibration.present("cpu")[3] == threads
    for device in ("cpu", "cuda", "something else"):
        for precision in choice.PRECISIONS:
            for itemsize in (4, 8):
                machine = calibration.machine(device, precision, itemsize)
                assert machine.product_rate(64) > machine.product_rate(2) > 0
                assert machine.peak >= machine.narrow_rate(4)
    assert calibration.machine("cuda", "bf16").peak > calibration.machine("cuda").peak


def test_the_override_is_used_for_its_own_type_only(override, tmp_path):
    shipped = calibration.machine("cuda")
    override(saved(tmp_path, content(gbytes=12345.0)))
    assert calibration.machine("cpu").gbytes == 12345.0
    assert calibration.machine("cuda") == shipped
    assert "mine.json: measured on" in info.report()


WRONG = {
    "not JSON": ("{", "expected a calibration file"),
    "no object": ("[]", "expected a JSON object"),
    "missing key": ({"device": None}, "device=None: expected a printable string"),
    "type": ({"type": "tpu"}, "type='tpu'"),
    "threads": ({"threads": 0}, "threads=0"),
    "measured": ({"measured": 1}, "measured=1: expected true or false"),
    "no figures": ({"figures": 3}, "figures=3"),
    "negative": ({"gbytes": -1}, r"figures.gbytes=-1: expected a number from 1e-15 to 1e\+15"),
    "infinite": ({"call": float("inf")}, "figures.call=inf"),
    "text": ({"im2col": "fast"}, "figures.im2col='fast'"),
    "two of three": ({"assemble": [1, 2]}, r"figures.assemble=\[1, 2\]: expected three numbers"),
    "no tables": ({"pack": [1, 2, 3]}, r"figures.pack=\[1, 2, 3\]: expected a list of pairs"),
    "two tables": ({"pack": [[[1, 2]], [[1, 2]]]}, "expected three lists of pairs"),
    "no pairs": ({"product": [1, 2]}, "figures.product"),
    "oneDNN": ({"onednn": 1.3}, "figures.onednn=1.3: expected a list of pairs|figures.onednn"),
    "too large": ({"gbytes": 1e300}, r"figures.gbytes=1e\+300: expected a number from 1e-15"),
    "too many threads": ({"threads": 10**400}, "threads=10+: expected from 1 to"),
    "too large a size": ({"wgrad": [[10**400, 1.0]]}, "figures.wgrad.*expected sizes from 1 to"),
    "no line": ({"device": "a\nb"}, "device=.*expected a printable string"),
    "deep": ("[" * 100_000, "expected a calibration file"),
    "unordered": ({"wgrad": [[16, 1.0], [4, 2.0]]}, "figures.wgrad.*ascending"),
    "unknown": ({"flops": 1}, "figures.flops: no such figure"),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_name_the_file_and_the_key(override, tmp_path, what):
    wrong, message = WRONG[what]
    data = wrong
    if isinstance(wrong, dict):
        data = content()
        whole = wrong.keys() <= data.keys()
        (data if whole else data["figures"]).update(wrong)
    path = saved(tmp_path, data)
    override(path)
    with pytest.raises(ValueError, match=message) as raised:
        calibration.calibration("cpu")
    assert f"{calibration.VARIABLE}={path}" in str(raised.value)
    assert str(raised.value) in info.report()


def test_a_missing_figure_or_file_is_named(override, tmp_path):
    data = content()
    del data["figures"]["narrow"]
    override(saved(tmp_path, data))
    with pytest.raises(ValueError, match=r"figures\.narrow is missing"):
        calibration.calibration("cpu")
    override(tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"absent\.json: expected a calibration file"):
        calibration.calibration("cpu")


def test_interpolation():
    points = ((4, 10.0), (16, 30.0))
    assert calibration.interpolate(points, 2) == 5
    assert calibration.interpolate(points, 4) == 10
    assert calibration.interpolate(points, 8) == pytest.approx(20)
    assert calibration.interpolate(points, 1000) == 30


def test_importing_reads_no_calibration():
    code = (
        "import dbp_kernels; from dbp_kernels.planning import calibration as c; "
        "print(c.shipped.cache_info().currsize, c.cpu_name.cache_info().currsize)"
    )
    environment = {**os.environ, calibration.VARIABLE: "/absent.json"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["0", "0"], done.stderr
