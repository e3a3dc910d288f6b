"""The Triton backend: one file per kernel family, ``ops.py`` puts them behind the opaque ops."""
