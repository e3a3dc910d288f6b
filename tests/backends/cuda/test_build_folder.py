"""Compiled code is loaded from folders only that no other user can have prepared."""

import os
import tempfile

import pytest

from bench.counters.build_folder import build_folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Where the folder is looked for."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"dbp-kernels-toy-{os.getuid()}"


def of_others(place, monkeypatch):
    place.mkdir(mode=0o700)
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)
    place.rename(place.with_name(f"dbp-kernels-toy-{real + 1}"))


PREPARED = {
    "another owner": of_others,
    "written by all": lambda place, _: (place.mkdir(), place.chmod(0o777)),
    "read by the group": lambda place, _: (place.mkdir(), place.chmod(0o750)),
    "a link": lambda place, _: (
        (place.parent / "elsewhere").mkdir(mode=0o700),
        place.symlink_to(place.parent / "elsewhere"),
    ),
    "a file": lambda place, _: place.touch(),
}


@pytest.mark.parametrize("prepare", PREPARED.values(), ids=PREPARED)
def test_what_others_may_have_prepared_is_not_used(place, prepare, monkeypatch):
    prepare(place, monkeypatch)
    before = set(place.parent.iterdir())
    made = build_folder("toy")
    assert made.resolve() not in before
    assert made.parent == place.parent
    assert made.stat().st_mode & 0o777 == 0o700
    assert not list(made.iterdir())


def test_our_own_is_kept(place):
    made = build_folder("toy")
    assert made == place
    (made / "object").touch()
    assert build_folder("toy") == place
    assert (place / "object").exists()
    assert place.stat().st_mode & 0o777 == 0o700
