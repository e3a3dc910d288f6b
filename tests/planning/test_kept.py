"""What is kept, and how its bytes are counted."""

import gc
import os
import signal
import threading
import time
import tracemalloc
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from dbp_kernels.planning.kept import Store, kept, size_of


@dataclass(frozen=True)
class Pair:
    left: object
    right: object


def test_sizes_are_those_of_all_that_a_value_consists_of():
    gc.collect()
    tracemalloc.start()
    value = [Pair((n, float(n)), {str(n): [n, n + 0.5]}) for n in range(1000, 2000)]
    allocated = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.8 * allocated < size_of(value) < 1.3 * allocated


def test_an_object_is_counted_once_and_tensors_with_their_memory():
    table = torch.zeros(1000)
    one = size_of(table)
    assert 4000 < one < 6000
    assert size_of((table, table)) < one + 100
    assert size_of(partial(print, table)) > 4000
    assert size_of(Pair(table, Pair)) < one + 1000  # no classes


def test_counting_stops_once_it_is_enough():
    looked = []

    class Spy(tuple):
        def __iter__(self):
            looked.append(self)
            return super().__iter__()

    size_of([Spy(range(100)) for _ in range(50)], 2000)
    assert 0 < len(looked) < 10


def test_the_least_recently_used_goes_first():
    calls = []

    @kept(mebibytes=0.05)
    def table(n, *, scale=1):
        """Its documentation."""
        calls.append(n)
        return bytes(10_000)

    for n in (1, 2, 3, 4, 1, 5, 6):
        table(n)
    assert calls == [1, 2, 3, 4, 5, 6]
    table(1)
    assert calls[-1] == 6
    table(2)
    table(2, scale=2)
    assert calls[-2:] == [2, 2]
    assert table.answers.nbytes <= 0.05 * 2**20
    table.cache_clear()
    assert (len(table.answers), table.answers.nbytes) == (0, 0)
    assert table.__doc__ == "Its documentation."


def test_what_is_too_large_is_not_kept_and_displaces_nothing():
    store = Store(10_000)
    store.keep("small", bytes(5000))
    store.keep("large", bytes(20_000))
    assert store.get("large") is None
    assert store.get("small") == (bytes(5000),)
    store.keep("small", None)  # in place of what was there
    assert store.get("small") == (None,)
    assert 0 < store.nbytes < 1000


def test_bytes_stay_bounded_with_many_threads():
    store = Store(30_000)

    def work(seed):
        for n in range(3000):
            key = n * seed % 13
            if store.get(key) is None:
                store.keep(key, bytes(1000 * (key + 1)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < store.nbytes <= 30_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_process_forked_while_a_thread_is_at_it_does_not_wait_for_ever():
    store, inside = Store(1000), threading.Event()
    store.keep("key", "value")

    class Slow:
        def __hash__(self):
            inside.set()
            time.sleep(0.3)
            return 0

    thread = threading.Thread(target=store.get, args=(Slow(),))
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(store.get("key") != ("value",))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()
