"""What is prepared for inputs that look alike: when it is made anew, when it is not, what it keeps."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch

from dbp_kernels import precision
from dbp_kernels.backends import prepared
from dbp_kernels.backends.cuda import library
from dbp_kernels.backends.triton import runtime
from dbp_kernels.planning.kept import Store


@pytest.fixture
def made(monkeypatch):
    """A prepared function and the list of what it was called with; a cache of its own."""
    monkeypatch.setattr(prepared, "_kept", Store(1 << 20))
    monkeypatch.setattr(prepared, "_captured", set())
    calls = []

    @prepared.prepared
    def make(x, *arguments):
        calls.append(arguments)
        return lambda: None

    return make, calls


def images(offset=0, dtype=torch.float32):
    return torch.zeros(1000, dtype=dtype)[offset : offset + 240].view(2, 3, 4, 10)


def test_inputs_that_look_alike_share_what_is_prepared(made):
    make, calls = made
    first = make(images(), 1, "a")
    assert make(images(), 1, "a") is first
    assert make(images(4), 1, "a") is first  # 16 bytes further on
    with torch.inference_mode():
        assert make(images(), 1, "a") is first
    assert len(calls) == 1


def test_everything_that_decides_tells_inputs_apart(made):
    make, calls = made
    x = images()
    alike = [
        x,
        x.view(2, 3, 10, 4),
        x.contiguous(memory_format=torch.channels_last),
        x[:, :, :, ::2],
        images(1),  # begins off a multiple of 16 bytes
        x.half(),
        x.to("meta"),
    ]
    found = {make(one) for one in alike} | {make(x, 1), make(x, 2)}
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found.add(make(x))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    with precision.update_precision(None, True):
        found.add(make(x))
    assert len(found) == len(calls) == len(alike) + 4


def test_their_bytes_are_bounded_and_the_least_recently_used_goes(monkeypatch):
    monkeypatch.setattr(prepared, "_kept", Store(10_000))
    calls = []

    @prepared.prepared
    def table(x, n):
        calls.append(n)
        return torch.zeros(3000, dtype=torch.uint8)

    x = images()
    for n in (0, 1, 0, 2, 3):
        table(x, n)
    assert len(prepared._kept) == 2
    assert prepared._kept.nbytes <= 10_000
    table(x, 2)
    assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda: library.simulate(None),
        lambda: runtime.simulate(None),
    ],
    ids=["cuda simulator", "triton simulator"],
)
def test_what_other_answers_depend_on_starts_anew(made, change):
    make, calls = made
    make(images())
    change()
    make(images())
    assert len(calls) == 2


def test_tables_that_a_graph_has_captured_are_never_freed(made, monkeypatch):
    make, _ = made

    class OnGpu:  # what is looked at of a tensor on a GPU
        shape, dtype, device, is_cuda = (2, 3), torch.float32, torch.device("cuda:0"), True

        def stride(self):
            return 3, 1

        def data_ptr(self):
            return 256

        def storage_offset(self):
            return 0

        def untyped_storage(self):
            return torch.zeros(6).untyped_storage()

    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    alive = {}
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        prepared.forget()
        alive[capturing] = weakref.ref(make(OnGpu()))
    prepared.forget()
    gc.collect()
    assert alive[False]() is None
    assert alive[True]() is not None


def test_many_threads(made, monkeypatch):
    make, _ = made
    store = Store(8_000)
    monkeypatch.setattr(prepared, "_kept", store)
    x, errors = images(), []

    def work(seed):
        try:
            for n in range(2000):
                make(x, (n * seed) % 23)()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert 0 < len(store) < 23
    assert store.nbytes <= 8_000
