"""Start of the process in which kernels are compiled. Imports nothing that could import Triton."""

import os


def compile_kernels() -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    import torch

    torch.set_num_threads(1)
