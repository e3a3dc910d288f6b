"""The CUDA C++ backend: ``library.py`` loads csrc's kernels, ``ops.py`` puts them behind the ops."""
