"""What is worked out once and kept, bounded by its bytes: the least recently used goes first.

For answers that grow with a kernel, such as lists of products. Where all answers have a few hundred
bytes each, ``functools.lru_cache`` bounds them as well, and is quicker.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from functools import partial, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_PACKAGE = __name__.partition(".")[0] + "."


def size_of(value: object, enough: int = sys.maxsize) -> int:
    """Bytes of a value with all that it consists of, each object once; at ``enough`` it stops.

    It looks into containers, dataclasses, objects of this package and partial calls, and counts
    tensors' memory.
    """
    seen: dict[int, object] = {}
    found: list[Any] = [value]
    total = 0
    while found and total < enough:
        one = found.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen[id(one)] = one  # held meanwhile: no other object gets its id
        total += sys.getsizeof(one)
        if isinstance(one, torch.Tensor):
            total += one.untyped_storage().nbytes()
        elif isinstance(one, tuple | list | set | frozenset):
            found.extend(one)
        elif isinstance(one, dict):
            found.extend(one)
            found.extend(one.values())
        elif isinstance(one, partial):
            found += [one.func, one.args, one.keywords]
        elif is_dataclass(one) or type(one).__module__.startswith(_PACKAGE):
            if hasattr(one, "__dict__"):
                found.append(vars(one))
            elif is_dataclass(one):
                found += [getattr(one, f.name) for f in fields(one)]
    return total


# Of all stores: a fork waits for it, as the child would for a thread that it does not have. A signal's
# handler may come here from within.
_lock = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


class Store(Generic[T]):
    """Values by keys, up to ``most`` bytes of both. Safe in several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> tuple[T] | None:
        """The value in a tuple, which now is the most recently used one; None if there is none."""
        with _lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[:1]

    def keep(self, key: Hashable, value: T) -> None:
        """In place of the least recently used ones; a value too large by itself is not kept."""
        size = size_of((key, value), self._most + 1)
        if size > self._most:
            return
        with _lock:
            self._values[key] = value, size
            self._values.move_to_end(key)
            total = self.nbytes
            while total > self._most:
                _, (_, gone) = self._values.popitem(last=False)
                total -= gone

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        with _lock:
            return sum(size for _, size in self._values.values())

    def clear(self) -> None:
        """Forgets all."""
        with _lock:
            self._values.clear()


class Kept(Generic[P, T]):
    """A function of hashable arguments that keeps its answers."""

    def __init__(self, make: Callable[P, T], most: int) -> None:
        update_wrapper(self, make)
        self._make = make
        self.answers: Store[T] = Store(most)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        key: Hashable = (args, *kwargs.items()) if kwargs else args
        found = self.answers.get(key)
        if found is not None:
            return found[0]
        answer = self._make(*args, **kwargs)
        self.answers.keep(key, answer)
        return answer

    def cache_clear(self) -> None:
        """Forgets all answers, as of ``functools.lru_cache``."""
        self.answers.clear()


def kept(mebibytes: float) -> Callable[[Callable[P, T]], Kept[P, T]]:
    """A decorator: keeps a function's answers, up to so many MiB of them."""
    return lambda make: Kept(make, int(mebibytes * 2**20))
