"""What the planner chooses from, and a choice: made once, then handed down to the backend.

The words: an *algorithm* computes S, a *plan* computes an update of R (all plans are exact), a way
computes statistics; a `Choice` is one of them with its estimated cost. A *schedule* says which layers
are updated at which step, a *budget* what share of the time that may take; both are in ``optim``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PLANS = ("gram", "direct", "samples")
STATISTICS = ("fused", "gram", "direct")  # ways to C and V; "fused" is one kernel
KERNEL_BACKENDS = ("triton", "cuda")  # have algorithms of their own
# Of a product's operands; float32 is one of the first three, the second three products of tf32.
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class Choice:
    """One way to compute something, and what the model thinks it costs.

    ``unfolded`` belongs to the algorithm "shift": the axes whose taps become channels.
    """

    name: str
    gflop: float
    seconds: float
    unfolded: tuple[bool, ...] = ()
    # of the plan or way "gram": the algorithm for S
    gram: Choice | None = field(default=None, compare=False)

    @property
    def algorithm(self) -> Choice:
        """That for S, where S is computed. Raises ValueError where it is not."""
        if self.gram is None:
            raise ValueError(f"choice={self}: expected one with an algorithm for S")
        return self.gram

    def __str__(self) -> str:
        name = self.name
        if any(self.unfolded):
            axes = ",".join(str(d) for d, u in enumerate(self.unfolded) if u)
            name += f"[unfold axis {axes}]"
        return f"{name} ({self.gram})" if self.gram else name
