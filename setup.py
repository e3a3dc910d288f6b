"""Build script. Everything declarative is in pyproject.toml; the CUDA kernels are compiled here.

Without nvcc, ninja or torch's headers the package is pure Python, and says so. DBP_BUILD_CUDA=0
never builds the kernels, =1 makes their absence an error. torch is visible to a build only with
``pip install --no-build-isolation .``
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import build as cuda

EXTENSION = f"dbp_kernels.backends.cuda.{Path(cuda.LIBRARY).stem}"


class BuildCuda(build_ext):
    """One shared library with torch ops: not a Python module, so no Python version in its name."""

    def build_extension(self, extension):
        library = cuda.build(cuda.DIRECTORY)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + Path(cuda.LIBRARY).suffix


class AnyPythonWheel(bdist_wheel):
    """The library has no Python symbols: one wheel for every Python, but for one platform."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


if cuda.wanted():
    setup(
        ext_modules=[Extension(EXTENSION, sources=[])],
        cmdclass={"build_ext": BuildCuda, "bdist_wheel": AnyPythonWheel},
    )
else:
    setup()
