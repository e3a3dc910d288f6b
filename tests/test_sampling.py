"""The memory that samples go into: the same from step to step, bounded, and never read too late."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import nn as dnn
from dbp_kernels import sampling


def attached(layer: nn.Module | None = None, **options):
    """(layer, its DecorUpdate, its recorder)."""
    layer = layer or dnn.DecorConv2d(4, 3, 3)
    decor = dbp.DecorUpdate(layer, **{"sample": 1.0, **options})
    return layer, decor, decor._recorders[0][0]


def addresses(recorder) -> list[int]:
    return [sample.data_ptr() for sample in recorder.samples]


def images(count=4, **options) -> torch.Tensor:
    return torch.randn(count, 4, 5, 5, **options)


def test_a_step_reuses_the_memory_of_the_step_before():
    layer, decor, recorder = attached()
    seen = []
    for _ in range(4):
        for _ in range(3):  # gradient accumulation
            layer(images())
        assert len(set(addresses(recorder))) == 3
        seen.append(addresses(recorder))
        decor.step()
        assert recorder.samples == []
    assert seen == 4 * [seen[0]]


def test_samples_hold_what_the_last_forward_passes_saw():
    layer, decor, recorder = attached()
    for _ in range(3):
        batches = [images(), images()]
        for x in batches:
            layer(x)
        for sample, x in zip(recorder.samples, batches, strict=True):
            assert torch.equal(sample, x)
            assert sample.stride() == x.stride()
        decor.discard()


def test_a_smaller_batch_uses_the_beginning_of_the_memory():
    layer, decor, recorder = attached()
    places = []
    for count in (6, 2, 6, 8, 6):
        x = images(count)
        layer(x)
        assert torch.equal(recorder.samples[0], x)
        places += addresses(recorder)
        decor.step()
    assert places[0] == places[1] == places[2]
    assert places[3] == places[4]  # a larger one takes more memory, once


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[..., :4],
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.double(),
    ],
    ids=["shape", "strides", "dtype"],
)
def test_another_layout_gets_other_memory(change):
    layer, decor, recorder = attached()
    layer(images())
    decor.discard()
    x = change(images())
    layer.to(x.dtype)(x)
    assert torch.equal(recorder.samples[0], x)
    assert recorder.samples[0].dtype == x.dtype
    assert recorder.samples[0].stride() == x.contiguous(memory_format=suggested(x)).stride()
    assert len(recorder._buffers) == 1


def suggested(x: torch.Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_random_samples_are_selected_into_the_memory(layout, autocast):
    layer, decor, recorder = attached(sample=3, sampling="random")
    places = []
    for _ in range(3):
        x = images(10).contiguous(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(x)
        (sample,) = recorder.samples
        assert sample.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert sample.is_contiguous(memory_format=layout)
        chosen = [next(i for i, y in enumerate(x.to(sample.dtype)) if y.equal(s)) for s in sample]
        assert len(set(chosen)) == 3
        places += addresses(recorder)
        decor.step()
    assert len(set(places)) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_uses_the_same_memory(backend):
    torch._dynamo.reset()
    layer, decor, recorder = attached()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    places = []
    for _ in range(3):
        x = images()
        compiled(x)
        assert torch.equal(recorder.samples[0], x)
        places += addresses(recorder)
        decor.step()
    assert len(set(places)) == 1


def test_evaluation_between_steps_leaves_samples_and_memory_alone():
    layer, decor, recorder = attached()
    layer(images())
    decor.step()
    layer(x := images())
    before = addresses(recorder)
    layer.eval()
    layer(images())
    layer.train()
    assert addresses(recorder) == before
    assert torch.equal(recorder.samples[0], x)


def test_steps_between_updates_take_no_samples_and_keep_the_memory():
    layer, decor, recorder = attached(update_every=3)
    places = []
    for step in range(7):
        layer(images())
        assert len(recorder.samples) == (step % 3 == 0)
        places += addresses(recorder)
        decor.step()
    assert len(places) == 3
    assert len(set(places)) == 1


def test_the_memory_of_a_detached_layer_is_freed():
    layer, decor, recorder = attached()
    layer(images())
    memory = weakref.ref(recorder.samples[0])
    decor.discard()
    assert memory() is not None
    decor.detach()
    gc.collect()
    assert memory() is None


def test_copies_carry_no_samples():
    layer, decor, recorder = attached()
    layer(images())
    for other, updated in (
        copy.deepcopy((layer, decor)),
        pickle.loads(pickle.dumps((layer, decor))),
    ):
        twin = updated._recorders[0][0]
        assert twin.samples == []
        assert twin._buffers == []
        other(images())
        assert addresses(twin) != addresses(recorder)
    assert not any("buffers" in key for key in decor.state_dict())


def test_what_overlap_reads_is_not_written_by_forward_passes_in_the_block():
    """The work is queued before the block and may run late: it reads the samples until the end."""
    layer, decor, recorder = attached()
    layer(images())
    decor.step()
    layer(x := images())
    read = recorder.samples[0]
    block = decor.overlap()
    block.__enter__()
    decor.discard()
    layer(images())
    layer(images())
    assert torch.equal(read, x)
    block.__exit__(None, None, None)
    assert recorder.samples == []


def test_overlap_gives_the_memory_back_after_the_block():
    layer, decor, recorder = attached()
    layer(images())
    memory = weakref.ref(recorder.samples[0])
    with decor.overlap():
        assert memory() is not None
    assert memory() is None


def test_a_forgotten_step_is_told_once_and_bounded(monkeypatch):
    monkeypatch.setattr(sampling, "MAX_PENDING", 5)
    net = nn.Sequential(dnn.DecorLinear(3, 3), dnn.DecorLinear(3, 2))
    decor = dbp.DecorUpdate(net, lr=0.1, sample=1.0)
    batches = [torch.randn(2, 3) for _ in range(8)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x in batches:
            net(x)
    assert len(told) == 1
    assert "step()" in str(told[0].message)
    first = decor._recorders[0][0]
    assert len(first.samples) == len(first._buffers) == 5
    for sample, x in zip(first.samples, batches[-5:], strict=True):
        assert torch.equal(sample, x)
    assert first.seen == 10
    expected = dbp.decor_update(torch.cat(batches[-5:]), torch.eye(3), (), lr=0.1)[0]
    decor.step()
    torch.testing.assert_close(net[0].R, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        for x in batches:
            net(x)
