"""What makes the Triton interpreter cheaper and changes no number of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def language_patched_once() -> Iterator[None]:
    """Let a launch put its own functions into ``triton.language`` once, not at every helper call.

    A kernel that calls a helper (``tl.zeros`` and ``tl.sum`` are such ones) has them put in again,
    which finds every name in place and takes a third of the time of a launch.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, bool]] = set()

    def once(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values()}
        names = id(tl) in seen, id(tl.core) in seen
        if names in patched:
            return None
        patched.add(names)
        return patch(function)

    def begin(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, begin
    yield
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch
