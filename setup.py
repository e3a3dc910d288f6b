"""Build script. Everything declarative is in pyproject.toml; extensions are compiled here.

There are no extensions yet: the package is pure Python and needs no compiler.
"""

from setuptools import setup

setup()
