"""The folder that travels to a machine without network: what is in it, and that it runs there."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import cli
from bench.core import machine
from bench.device import pack
from bench.device.pack import PackError

RUN = Path(pack.__file__).with_name(pack.RUN)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder without CUDA kernels and spare wheels, with data."""
    there = tmp_path_factory.mktemp("pack")
    data = there / "hub" / "plain_text"
    data.mkdir(parents=True)
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        (data / name).write_bytes(b"images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBP_BUILD_CUDA", "0")
        manifest = pack.pack(there / "folder", data=data.parent, download=False)
    return there / "folder", manifest


def test_the_folder_holds_the_wheel_and_what_checks_it(packed):
    folder, manifest = packed
    (wheel,) = folder.glob("wheels/dbp_kernels-*.whl")
    shipped = {path.relative_to(machine.ROOT).as_posix() for path in modules(machine.ROOT)}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")} == shipped
    assert not (folder / "dbp_kernels").exists()
    for name in ("bench/__main__.py", "tests/conftest.py", "csrc/build.py", "pyproject.toml"):
        assert (folder / name).read_text() == (machine.ROOT / name).read_text()
    assert len(list(folder.glob("data/cifar10/*.parquet"))) == 2
    assert os.access(folder / "run.sh", os.X_OK)
    assert manifest == json.loads((folder / "packed.json").read_text())
    assert (manifest["wheel"], manifest["cuda"], manifest["data"]) == (wheel.name, None, True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pyc", ".so", ".png")]
    assert sum(manifest["bytes"].values()) == sum(
        path.stat().st_size for path in files if path.name != "packed.json"
    )


def modules(root: Path):
    return (root / "dbp_kernels").rglob("*.py")


def test_nothing_in_it_names_the_machine_that_made_it(packed):
    folder, _ = packed
    here = [os.fsencode(path) for path in (machine.ROOT, folder)]
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".json":  # committed results hold their own commands
            contents = [file.read_bytes()]
            if file.suffix == ".whl":
                archive = zipfile.ZipFile(file)
                contents = [archive.read(name) for name in archive.namelist()]
            assert not any(path in content for content in contents for path in here), file


def test_a_packed_folder_knows_its_commit(packed, monkeypatch):
    folder, manifest = packed
    assert manifest["commit"] == machine.commit()
    (folder / "packed.json").write_text(json.dumps({**manifest, "commit": "c0", "dirty": True}))
    monkeypatch.setattr(machine, "ROOT", folder)
    assert (machine.commit(), machine.dirty()) == ("c0", True)


@pytest.fixture
def no_wheel(monkeypatch):
    """In place of building one: the other parts are what is tested."""

    def build(folder):
        folder.mkdir(parents=True)
        wheel = folder / "dbp_kernels-0-py3-none-any.whl"
        zipfile.ZipFile(wheel, "w").close()
        return wheel

    monkeypatch.setattr(pack, "_build_wheel", build)


@pytest.mark.usefixtures("no_wheel")
def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "note").write_text("mine")
    assert cli.main(["device-check", "--pack", str(tmp_path), "--no-download"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
    with pytest.raises(PackError, match="not an empty folder"):
        pack.pack(tmp_path / "note")


@pytest.mark.usefixtures("no_wheel")
def test_a_folder_too_large_is_refused_by_its_largest_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "LIMIT", 2e6)
    data = tmp_path / "data"
    data.mkdir()
    (data / "train-0.parquet").write_bytes(bytes(3_000_000))
    (data / "test-0.parquet").touch()
    with pytest.raises(
        PackError, match=r"more than 2\.0 MB; largest: data/cifar10/train-0.parquet 3"
    ):
        pack.pack(tmp_path / "folder", data=data, download=False)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.usefixtures("no_wheel")
def test_missing_data_are_named(tmp_path):
    with pytest.raises(PackError, match=r"no train-\*\.parquet for cifar10"):
        pack.pack(tmp_path / "folder", data=tmp_path / "nowhere", download=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_wheel")
def test_runs_of_an_earlier_visit_go_along(tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    for name in (*pack.SOURCES, "runs/other", "runs/cifar10-airbench/tune-sgd"):
        (clone / name).mkdir(parents=True)
    for name in ("result.json", "events.out.tfevents.1", "checkpoint.pt"):
        (clone / "runs" / "cifar10-airbench" / "tune-sgd" / name).touch()
    monkeypatch.setattr(machine, "ROOT", clone)
    pack.pack(tmp_path / "folder", download=False)
    found = {
        path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder" / "runs").rglob("*")
    }
    assert {str(path) for path in found if path.suffix} == {
        "runs/cifar10-airbench/tune-sgd/result.json"
    }
    assert Path("runs/other") not in found


@pytest.mark.usefixtures("no_wheel")
def test_without_an_index_the_folder_is_made_without_spare_wheels(tmp_path, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setattr(pack, "SPARE", ("expecttest", "sortedcontainers"))
    assert cli.main(["device-check", "--pack", str(tmp_path / "folder")]) == 0
    assert "the machine must have them: expecttest, sortedcontainers" in capsys.readouterr().err
    assert json.loads((tmp_path / "folder" / "packed.json").read_text())["spare"] == []


def test_a_wheel_that_does_not_build_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("DBP_BUILD_CUDA", "maybe")
    with pytest.raises(PackError, match="DBP_BUILD_CUDA='maybe': expected 0 or 1"):
        pack.pack(tmp_path / "folder", download=False)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- run.sh

_PYTHON = """#!{python}
import os, sys
if sys.argv[1:3] == ["-m", "bench"]:
    import json, dbp_kernels
    seen = dict(arguments=sys.argv[3:], cwd=os.getcwd(), package=dbp_kernels.__file__)
    open(sys.argv[sys.argv.index("--save") + 1], "w").write(json.dumps(seen))
    sys.exit(7)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


def run(folder: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """run.sh with a python whose device check says how it was started, with exit status 7."""
    python = cwd / "python"
    python.write_text(_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("OUT", "PYTHONPATH")}
    env.update(PYTHON=str(python), TMPDIR=str(cwd))
    command = [folder / "run.sh", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_run_installs_the_wheel_beside_and_returns_the_checks_status(packed, tmp_path):
    folder, _ = packed
    for name in ("first", "first-2"):
        done = run(folder, tmp_path, "first", "--budget", "60")
        assert done.returncode == 7, done.stderr
        saved = tmp_path / "out" / f"{name}.json"
        seen = json.loads(saved.read_text())
        assert seen["arguments"] == [
            "device-check",
            "first",
            "--save",
            str(saved),
            "--budget",
            "60",
        ]
        assert seen["cwd"] == str(folder)
        assert Path(seen["package"]).is_relative_to(tmp_path)


def test_run_takes_several_groups(packed, tmp_path):
    assert run(packed[0], tmp_path, "rest", "train", "--rehearse").returncode == 7
    saved = tmp_path / "out" / "rest-train.json"
    arguments = json.loads(saved.read_text())["arguments"]
    assert arguments == ["device-check", "rest", "train", "--save", str(saved), "--rehearse"]
    assert run(packed[0], tmp_path, "all").returncode == 7
    arguments = json.loads((tmp_path / "out" / "all.json").read_text())["arguments"]
    assert arguments[:2] == ["device-check", "--save"]


def test_run_wants_a_group(packed, tmp_path):
    for arguments in ((), ("second",)):
        done = run(packed[0], tmp_path, *arguments)
        assert done.returncode == 2
        assert "run.sh first|rest|train|all" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_packed_folder_runs_its_rehearsal(tmp_path, monkeypatch):
    """With the CUDA library where it has been built, and everything but the machine's torch packed."""
    if not (machine.ROOT / "build" / "cuda" / "libdbp_cuda.so").exists():
        monkeypatch.setenv("DBP_BUILD_CUDA", "0")
    folder, there = tmp_path / "folder", tmp_path / "machine"
    manifest = pack.pack(folder)
    assert sum(manifest["bytes"].values()) < 12e6  # without data
    there.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("OUT", "PYTHONPATH")}
    env.update(PYTHON=sys.executable, TMPDIR=str(there))
    stages = "calibration,training"
    command = [folder / "run.sh", "all", "--device", "cpu", "--rehearse", "--stages", stages]
    done = subprocess.run(command, cwd=there, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stderr  # a rehearsal has cases that go wrong
    result = json.loads((there / "out" / "all.json").read_text())
    assert Path(result["package"]["path"]).is_relative_to(there)
    assert result["machine"]["commit"] == manifest["commit"]
    cuda = f"cuda kernels, {manifest['cuda']}" if manifest["cuda"] else "none (pure Python)"
    assert result["environment"]["compiled parts"] == cuda
    assert "gbytes" in result["calibration"]["figures"]
    assert {record["status"] for record in result["runs"]} == {"finished"}
    assert len(result["runs"]) == 10
    assert (there / "out" / "all-runs.tar.gz").exists()
