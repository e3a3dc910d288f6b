"""The package from outside: import without torch, with an old torch, the environment report."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import dbp_kernels as dbp
from dbp_kernels import info

ROOT = Path(__file__).parent.parent


def python(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("fake_torch", "expected"),
    [
        ("raise ImportError('no torch')", "none is installed"),
        ("__version__ = '2.10.1+cpu'", "2.10.1+cpu is installed"),
    ],
)
def test_missing_or_old_torch_is_one_clear_sentence(tmp_path, fake_torch, expected):
    (tmp_path / "torch.py").write_text(fake_torch)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import dbp_kernels"
    result = python("-c", code)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dbp-kernels needs PyTorch 2.11 or newer")
    assert expected in last


def test_everything_in_all_exists_and_is_documented():
    for name in dbp.__all__:
        value = getattr(dbp, name)
        assert name == "__version__" or value.__doc__, name


def test_every_schema_is_an_op():
    text = files("dbp_kernels").joinpath("schemas.txt").read_text()
    names = [line.split("(")[0] for line in text.splitlines() if line and line[0] != "#"]
    assert len(names) == 10
    for name in names:
        assert hasattr(torch.ops.dbp, name)
        assert callable(getattr(dbp, name))


def test_info_reports_versions_devices_and_backends():
    report = json.loads(python("-m", "dbp_kernels", "info", "--json").stdout)
    assert report["torch"] == torch.__version__
    assert report["dbp-kernels"] == dbp.__version__
    assert report["devices"][0].startswith("cpu:")
    assert report["backends"]["cpu"]["eager"] == "usable"
    for name in ("triton", "cuda"):
        assert name in report["backends"]["cpu"][name]  # the reason names it
    if importlib.util.find_spec("triton"):
        interpreted = python("-m", "dbp_kernels", "info", "--json", interpret="1").stdout
        assert json.loads(interpreted)["backends"]["cpu"]["triton"] == "usable"
    text = info.report()
    assert torch.__version__ in text
    assert "eager on cpu" in text


def test_hooks_run_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    files = r"(?: \.| \$\(CPP\))?"  # hooks are given those that have changed
    lint = re.findall(rf"^\t\$\(BIN\)/(.*?){files}$", recipe, re.MULTILINE)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"^ +entry: (.*?)(?: --force-exclude)?$", hooks, re.MULTILINE)
    assert entries == lint
    assert len(lint) >= 4


def test_the_map_in_contributing_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = text[text.index("## Where things are") : text.index("## On a machine with a GPU")]
    words = set(re.findall(r"[a-z_0-9]+", places))
    named_whole = {"backends", "verify"}  # kernels and checks go by their folder
    package = ROOT / "dbp_kernels"
    for path in package.rglob("*.py"):
        inner = path.relative_to(package)
        if path.stem == "__init__":
            assert inner.parent.name in words | {""}, inner
        elif named_whole.isdisjoint(inner.parts):
            assert path.stem in words, inner
