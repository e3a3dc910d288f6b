"""What a type checker sees of the installed package, in a strict user's code."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parent.parent

# The README's ways into the package, with the type that a reader expects of each.
USER = """
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import dbp_kernels as dbp

x = torch.zeros(2, 3, 8, 8)
model = nn.Sequential(nn.Conv2d(3, 4, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
decor = dbp.attach(model, optimizer, lr=1e-5, kappa=0.5, sample=0.1)
assert_type(decor, dbp.Attached)
assert_type(decor.losses(), dict[str, Tensor])
assert_type(decor.R("0"), Tensor)
assert_type(decor.left_alone(), dict[str, str])
assert_type(decor.detach(), None)

assert_type(dbp.decorrelate_model(model), nn.Module)
update = dbp.DecorUpdate(model, lr=1e-5)
assert_type(update, dbp.DecorUpdate)
layer = dbp.nn.DecorConv2d(3, 4, 3)
assert_type(layer.R, Tensor)
assert_type(layer(x), Any)  # torch's own layers say no more
assert_type(dbp.fuse_model(model), nn.Module)
assert_type(dbp.load_decorrelated(model, model.state_dict()), nn.Module)
assert_type(dbp.fuse_state_dict(model.state_dict()), OrderedDict[str, Any])

R = torch.eye(27)
assert_type(dbp.patch_gram(x, 3, padding="same"), Tensor)
assert_type(dbp.patch_mean(x, (3, 3)), Tensor)
assert_type(dbp.decor_stats(x, R, 3), tuple[Tensor, Tensor])
assert_type(dbp.decor_update(x, R, 3, lr=1e-3), tuple[Tensor, Tensor])
assert_type(dbp.decor_conv2d(x, torch.zeros(4, 3, 3, 3), R), Tensor)
assert_type(dbp.reference.patch_gram(x, [3, 3], [1, 1], [0, 0], [1, 1], 1), Tensor)
assert_type(dbp.__version__, str)
with dbp.backend("eager"):
    pass
"""
# and what it must not take
WRONG = {
    "dbp.attach(model)": "Missing positional argument",
    "dbp.patch_gram(x, 3, padding=0.5)": "incompatible type",
    "dbp.decor_update(x, R, 3)": "Missing named argument",
    "dbp.no_such_name": "has no attribute",
}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment with the package's wheel, in front of this one's torch."""
    there = tmp_path_factory.mktemp("installed")
    # what earlier builds left in the clone's build folder would be packed too
    (there / "setup.cfg").write_text(f"[build]\nbuild_base = {there}/build\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", ROOT],
        cwd=there,
        env={**os.environ, "DBP_BUILD_CUDA": "0", "DIST_EXTRA_CONFIG": str(there / "setup.cfg")},
        check=True,
    )
    venv.create(there / "venv")
    executable = there / "venv" / "bin" / "python"
    get = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([executable, "-c", get], capture_output=True, text=True, check=True)
    site = Path(found.stdout.strip())
    (wheel,) = there.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable


def test_a_strict_checker_sees_the_types_of_the_installed_package(python, tmp_path):
    right = USER.strip().splitlines()
    (tmp_path / "user.py").write_text("\n".join([*right, *WRONG]) + "\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--python-executable", python),
            *("--config-file=", "--no-pretty", f"--cache-dir={tmp_path / 'cache'}", "user.py"),
        ],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "MYPYPATH"},
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == len(WRONG), done.stdout + done.stderr
    for number, (line, expected), error in zip(range(len(WRONG)), WRONG.items(), errors):
        assert error.startswith(f"user.py:{len(right) + number + 1}: "), line
        assert expected in error
