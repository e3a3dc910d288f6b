"""Start of the process in which kernels are compiled. Imports nothing that could import Triton."""

import os


def compile_kernels() -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    import torch

    torch.set_num_threads(1)
    # torch.empty is filled with NaN, as the fixture ``poison`` does
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
