"""Fixtures of the tests of hooks."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _heap_of_its_own() -> Iterator[None]:
    """Keep the collector off what earlier modules left.

    A paged cache and the compiler go through all of the heap again and again, which takes half of
    the time where a process has run hundreds of other tests.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
