"""Samples in rows of channels: read in place by kernels that want that, and an image to all others."""

import copy

import pytest
import torch
from helpers import DEVICE
from torch import nn

import dbp_kernels as dbp
from dbp_kernels import choose
from dbp_kernels.backends.rows import in_rows, padded
from dbp_kernels.planning.choice import Choice
from dbp_kernels.planning.geometry import make_geometry
from dbp_kernels.planning.planner import reads_rows
from dbp_kernels.sample_memory import SampleMemory

runtime = pytest.importorskip("dbp_kernels.backends.triton.runtime")
pytest.importorskip("triton")
from dbp_kernels.backends.triton import ops, pack  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (runtime.INTERPRET or DEVICE.type == "cuda"), reason="there is nothing to run kernels"
)

LAYERS = {
    "3x3": (lambda: nn.Conv2d(5, 4, 3, padding=1), (2, 5, 4, 3)),
    "3x3, whole rows": (lambda: nn.Conv2d(8, 4, 3), (2, 8, 4, 3)),
    "stride, groups": (lambda: nn.Conv2d(6, 4, 3, stride=2, groups=2), (2, 6, 5, 4)),
    "reflected": (lambda: nn.Conv2d(5, 4, 3, padding=1, padding_mode="reflect"), (2, 5, 4, 3)),
    "1x1": (lambda: nn.Conv2d(5, 4, 1), (2, 5, 2, 3)),
    "1d": (lambda: nn.Conv1d(5, 4, 3), (2, 5, 6)),
    "3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 2, 3, 2)),
    "rows": (lambda: nn.Linear(7, 4), (5, 7)),
    "tokens": (lambda: nn.Linear(7, 4), (2, 3, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(5, 4, 2), (2, 5, 2, 3)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def launched(monkeypatch):
    """Kernels are taken for every update, by shifted products; what packs is noted."""
    calls = []

    def choices(geometry, device_type, dtype, backend=None):
        name = "triton_direct" if geometry.pointwise else "triton_shift"
        return (Choice("gram", 0.0, 0.0, gram=Choice(name, 0.0, 0.0)),)

    def packing(x, out, *arguments):
        launch = make(x, out, *arguments)
        return lambda **tensors: (calls.append(tuple(out.shape)), launch(**tensors))

    make = pack.packing
    monkeypatch.setattr(choose, "update_choices", choices)
    for module in (pack, ops):
        monkeypatch.setattr(module, "packing", packing)
    with dbp.backend("triton"):
        yield calls


def plainly(monkeypatch):
    """From now on samples lie as their batches do."""
    monkeypatch.setattr(choose, "reads_rows", lambda *_: False)


def attached(layer: nn.Module, **options):
    """(its optimiser, its handle, its recorder)."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = dbp.attach(
        layer, optimizer, **{"lr": 0.02, "sample": 1.0, "cuda_graph": False} | options
    )
    return optimizer, handle, handle._engine._recorders[0][0]


def images(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.3).to(DEVICE, dtype)


def train(name: str, batches: int = 2, passes: int = 1, **options) -> torch.Tensor:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().to(DEVICE)
    optimizer, handle, _ = attached(layer, **options)
    for step in range(batches):
        for micro in range(passes):
            layer(images(shape, 10 * step + micro)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (key,) = handle.decorrelated()
    return handle.R(key)


@pytest.mark.parametrize(
    ("name", "passes"), [*((name, 1) for name in LAYERS), ("3x3", 2), ("3x3, whole rows", 2)]
)
def test_what_is_learnt_is_the_same_to_the_last_bit(name, passes, launched, monkeypatch):
    R = train(name, passes=passes)
    plainly(monkeypatch)
    assert torch.equal(R, train(name, passes=passes))
    assert not torch.equal(R, torch.eye(R.shape[-1], device=DEVICE).expand_as(R))


@each_layer
def test_samples_are_images_in_rows(name, launched):
    make, shape = LAYERS[name]
    layer = make().to(DEVICE)
    _, handle, recorder = attached(layer)
    places = set()
    for step in range(3):
        x = images(shape, step)
        layer(x)
        (sample,) = recorder.samples
        places.add(sample.data_ptr())
        assert torch.equal(sample, x)
        tokens = isinstance(layer, nn.Linear)
        channels = x.shape[-1 if tokens else 1]
        assert in_rows(sample.reshape(-1, channels) if tokens else sample)
        assert (
            sample.untyped_storage().nbytes()
            == 4 * padded(channels, x.dtype) * x.numel() // channels
        )
        handle._engine.discard()
    assert len(places) == 1


@each_layer
def test_one_copy_for_each_layer_and_nothing_is_packed_in_the_step(name, launched):
    if name == "reflected":
        pytest.skip("torch pads a copy")
    make, shape = LAYERS[name]
    layer = make().to(DEVICE)
    optimizer, _, _ = attached(layer)
    for step in range(2):
        layer(images(shape, step)).sum().backward()
        assert len(launched) == (0 if isinstance(layer, nn.Linear) else step + 1)
        before = list(launched)
        optimizer.step()
        assert launched == before
        optimizer.zero_grad()


def test_images_that_have_their_channels_last_are_copied_by_torch(launched):
    layer = nn.Conv2d(5, 4, 3).to(DEVICE)
    _, _, recorder = attached(layer)
    x = images((6, 5, 6, 5)).contiguous(memory_format=torch.channels_last)
    layer(x)
    assert torch.equal(recorder.samples[0], x)
    assert in_rows(recorder.samples[0])
    assert not launched


def test_a_smaller_batch_uses_the_beginning_and_a_larger_one_gets_more(launched):
    layer = nn.Conv2d(5, 4, 3).to(DEVICE)
    _, handle, recorder = attached(layer)
    places = []
    for count in (6, 2, 6, 8, 5):
        x = images((count, 5, 6, 5), count)
        layer(x)
        (sample,) = recorder.samples
        assert torch.equal(sample, x)
        assert in_rows(sample)
        places.append(sample.data_ptr())
        handle._engine.discard()
    assert places[0] == places[1] == places[2]
    assert places[3] == places[4]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sampling", ["first", "random"])
def test_some_images_of_a_batch(last, autocast, sampling, launched):
    layer = nn.Conv2d(5, 4, 3).to(DEVICE)
    _, handle, recorder = attached(layer, sample=3, sampling=sampling)
    places = set()
    for step in range(3):
        x = images((7, 5, 6, 5), step).bfloat16().float()  # the interpreter truncates
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            layer(x)
        (sample,) = recorder.samples
        assert sample.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert in_rows(sample)
        chosen = [next(i for i, image in enumerate(x) if image.equal(s.float())) for s in sample]
        assert len(set(chosen)) == 3
        assert sampling == "random" or chosen == [0, 1, 2]
        places.add(sample.data_ptr())
        handle._engine.discard()
    assert len(places) == 1


def test_what_kernels_do_not_copy_torch_does(launched):
    """float64 that autocast would leave alone, and tensors that somebody looks on."""
    x = images((6, 5, 6, 5))
    memory = SampleMemory(x, 6, None, torch.float32, "triton")
    assert len(launched) == 1
    assert torch.equal(memory.write(x.double(), 6, None), x)
    with torch.device("cpu"):  # a mode that sees torch's calls
        assert torch.equal(memory.write(x + 1, 6, None), x + 1)
    assert len(launched) == 1


def test_another_backend_copies_by_itself(launched):
    layer = nn.Conv2d(5, 4, 3).to(DEVICE)
    _, handle, recorder = attached(layer)
    for name, count in (("triton", 1), ("eager", 1), ("triton", 2)):
        with dbp.backend(name):
            layer(images((2, 5, 6, 6)))
        assert len(launched) == count
        assert torch.equal(recorder.samples[0], images((2, 5, 6, 6)))
        handle._engine.discard()


def test_images_that_lie_otherwise_than_the_last_are_copied_as_well(launched):
    """Of a batch with gaps, the first images have them too; chosen ones lie close."""
    x = images((4, 5, 6, 8))[..., :5]
    memory = SampleMemory(x, 4, None, torch.float32, "triton")
    chosen = torch.tensor([2, 0, 3, 1], device=DEVICE)
    for order in (None, chosen, None):
        assert torch.equal(memory.write(x, 4, order), x if order is None else x[order])
    assert len(launched) == 4


def test_layers_fed_by_one_tensor_share_the_rows(launched):
    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(7, 4), nn.Linear(7, 4)

        def forward(self, x):
            return self.q(x) + self.k(x)

    model = Projections().to(DEVICE)
    optimizer, handle, _ = attached(model)
    for step in range(2):
        model(images((6, 3, 7), step)).sum().backward()
        first, second = handle._engine._recorders[0]
        assert first.samples[0] is second.samples[0]
        assert in_rows(first.samples[0].view(-1, 7))
        optimizer.step()
        optimizer.zero_grad()
    assert handle.R("q") is handle.R("k")


def test_a_copy_of_the_model_learns_as_well(launched):
    layer = nn.Conv2d(5, 4, 3).to(DEVICE)
    optimizer, handle, _ = attached(layer)
    layer(images((6, 5, 6, 5))).sum().backward()
    twin, own = copy.deepcopy((layer, (optimizer, handle)))
    twin(images((6, 5, 6, 5))).sum().backward()
    own[0].step()
    assert not torch.equal(own[1].R("Conv2d"), handle.R("Conv2d"))


@pytest.mark.parametrize("plan", ["direct", "samples"])
def test_other_plans_read_the_rows_too(plan, launched, monkeypatch):
    def learnt():
        torch.manual_seed(0)
        layer = nn.Conv2d(5, 4, 3).to(DEVICE)
        optimizer, handle, recorder = attached(layer)
        layer(images((1, 5, 5, 5))).sum().backward()
        seen.append(in_rows(recorder.samples[0]))
        chosen.append(Choice(plan, 0.0, 0.0))
        optimizer.step()
        chosen.clear()
        return handle.R("Conv2d")

    seen, chosen, before = [], [], choose.update_choices
    monkeypatch.setattr(choose, "update_choices", lambda *a: chosen or before(*a))
    R = learnt()
    plainly(monkeypatch)
    torch.testing.assert_close(R, learnt(), rtol=0, atol=0)
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", torch.float64), ("eager", torch.float32)], ids=str
)
def test_what_no_kernel_reads_lies_as_in_the_batch(backend, dtype):
    layer = nn.Conv2d(8, 4, 3, dtype=dtype, device=DEVICE)
    _, _, recorder = attached(layer)
    x = images((6, 8, 6, 5), dtype=dtype)
    with dbp.backend(backend):
        layer(x)
    assert recorder.samples[0].stride() == x.stride()


def test_the_planner_tells_which_samples_are_read_as_rows():
    bf16 = torch.bfloat16
    middle = make_geometry((26, 64, 56, 56), (3, 3), (1, 1), (1, 1), (1, 1), 1)
    late = make_geometry((26, 512, 7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1)
    empty = make_geometry((0, 64, 56, 56), (3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert choose.update_choices(middle, "cuda", bf16, "triton")[0].algorithm.name == "triton_shift"
    assert choose.reads_rows(middle, "cuda", bf16, "triton")
    assert choose.update_choices(late, "cuda", bf16, "triton")[0].gram is None
    assert not choose.reads_rows(late, "cuda", bf16, "triton")
    assert not choose.reads_rows(empty, "cuda", bf16, "triton")
    assert not choose.reads_rows(middle, "cuda", bf16, "eager")


def test_kernels_that_gather_patches_want_no_rows():
    window = make_geometry((2, 3, 9, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1)
    pixels = make_geometry((2, 3, 9, 9), (1, 1), (1, 1), (0, 0), (1, 1), 1)
    names = ("triton_shift", "triton_direct", "cuda_direct", "cuda_sm90", "unfold", "shift")
    assert [reads_rows(name, window) for name in names] == [True, False, False, True, False, False]
    assert [reads_rows(name, pixels) for name in names] == [True, True, True, True, False, False]
