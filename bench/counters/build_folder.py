"""Where tests and benchmarks keep what they compile and load: nobody else may have put it there."""

import os
import stat
import tempfile
from pathlib import Path


def build_folder(name: str) -> Path:
    """A folder of ours alone, kept from run to run; a fresh one where others could write to that.

    The temporary folder is everybody's, and the name can be guessed.
    """
    path = Path(tempfile.gettempdir()) / f"dbp-kernels-{name}-{os.getuid()}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()  # of a link, the link's
        private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) & 0o077 == 0
        if not private or found.st_uid != os.getuid():
            return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))
    return path
