"""Marks of phases: seen by a profiler, and by nothing else."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import dbp_kernels as dbp
from dbp_kernels.phases import CONDENSE, PREFIX, phase


@phase("test")
def doubled(x, *, times=2):
    """Its docstring."""
    return x * times


def ranges(call) -> list[str]:
    """Names of our ranges that the profiler saw, in which ``call`` ran."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return [event.name for event in seen.events() if event.name.startswith(PREFIX)]


def test_a_call_is_a_range_for_a_profiler():
    x = torch.ones(3)
    assert ranges(lambda: doubled(x, times=3)) == [PREFIX + "test"]
    assert torch.equal(doubled(x, times=3), 3 * x)
    assert doubled.__doc__ == "Its docstring."
    assert not any(PREFIX in event.name for event in profiled_before(x))


def profiled_before(x):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        pass
    doubled(x)
    return seen.events()


def test_an_error_ends_the_range():
    @phase("fails")
    def fails():
        raise ValueError("no")

    def call():
        with pytest.raises(ValueError, match="no"):
            fails()
        doubled(torch.ones(1))

    assert ranges(call) == [PREFIX + "fails", PREFIX + "test"]


def test_traced_graphs_have_no_ranges():
    """Also where a profiler is active meanwhile. (What runs beside the tracing may be a range.)"""
    W, R, x = torch.randn(4, 3), torch.eye(3), torch.randn(2, 3)

    class Model(torch.nn.Module):
        def forward(self, x):
            return doubled(x) + dbp.functional.decor_linear(x, W, R, None)[:, :1]

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def trace():
        torch.compile(Model(), backend=backend, fullgraph=True)(x)
        graphs.append(torch.export.export(Model(), (x,)).run_decompositions().graph_module)
        graphs.append(torch.jit.trace(Model(), x, check_trace=False).inlined_graph)
        graphs.append(torch.fx.experimental.proxy_tensor.make_fx(Model())(x))

    ranges(trace)
    assert len(graphs) == 4
    for graph in graphs:
        assert "record_function" not in str(getattr(graph, "graph", graph))


def test_under_functional_transforms():
    W, R = torch.randn(4, 3), torch.randn(5, 3, 3)
    one = lambda R: dbp.functional.condensed_weight(W, R)  # noqa: E731
    expected = torch.stack([one(matrix) for matrix in R])
    seen = ranges(lambda: torch.testing.assert_close(torch.vmap(one)(R), expected))
    assert set(seen) <= {PREFIX + CONDENSE}
    ranges(lambda: torch.func.grad(lambda R: one(R).sum())(R[0]))
