"""Decorrelated backpropagation without im2col: one line beside an optimiser; layers; operators.

Start with ``attach``::

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decor = dbp.attach(model, optimizer)

``decorrelate_model`` and ``DecorUpdate`` are the same training with decorrelated layers, the functions
of ``torch.ops.dbp`` what both are made of; ``reference`` states the definitions.
"""

from dbp_kernels.version import __version__

_OLDEST_TORCH = (2, 11)
try:
    import torch
except ImportError as error:
    raise ImportError(
        "dbp-kernels needs PyTorch 2.11 or newer, and none is installed: see pytorch.org for the "
        "build that fits your machine"
    ) from error
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
    raise ImportError(
        f"dbp-kernels needs PyTorch 2.11 or newer, and {torch.__version__} is installed"
    )

from dbp_kernels import functional, nn, ops, reference  # noqa: E402
from dbp_kernels.backends import backend  # noqa: E402
from dbp_kernels.explanation import explain  # noqa: E402
from dbp_kernels.functional import *  # noqa: E402, F403
from dbp_kernels.optim.attach import attach  # noqa: E402
from dbp_kernels.optim.decor_update import DecorUpdate  # noqa: E402
from dbp_kernels.optim.handle import Attached  # noqa: E402
from dbp_kernels.optim.kinds import Patches, register  # noqa: E402
from dbp_kernels.state_dicts import fuse_state_dict, load_decorrelated  # noqa: E402
from dbp_kernels.surgery import decorrelate_model, fuse_model  # noqa: E402

__all__ = [
    "Attached",
    "DecorUpdate",
    "Patches",
    "__version__",
    "attach",
    "backend",
    "decorrelate_model",
    "explain",
    "fuse_model",
    "fuse_state_dict",
    "load_decorrelated",
    "nn",
    "ops",
    "reference",
    "register",
]
__all__ += functional.__all__  # in words that type checkers know
