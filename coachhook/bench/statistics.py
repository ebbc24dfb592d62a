"""Key statistics of a model with random weights: the pass, and all of ``collect_statistics``.

On a GPU the two are apart: what the pass does for each token is what counts for a whole text, and
bringing the sums of wide layers to the host (2.1 GB each for GPT-J) takes as long for a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from coachhook import bundled
from coachhook.bench.model import GPT_J, SMALL_GPT_J, Shape, random_model
from coachhook.bench.runner import Case, benchmark
from coachhook.models import (
    ForwardEnded,
    describe,
    fused_activations,
    get_submodule,
    partial_forward,
)
from coachhook.statistics import collect_statistics
from coachhook.statistics.accumulate import KeySums, frozen
from coachhook.statistics.batches import TokenBatch, TokenStream, make_batches
from coachhook.statistics.texts import read_texts

# The vocabulary is the bundled tokenizer's.
_SMALL = SMALL_GPT_J._replace(sizes={**SMALL_GPT_J.sizes, "vocab_size": 1792})


class _Given(NamedTuple):
    """A model, its tokenizer and batches of the bundled text, repeated as often as it takes."""

    model: Any
    tokenizer: Any
    batches: list[TokenBatch]


def _given(
    shape: Shape, tokens: int, batch_tokens: int, dtype: torch.dtype, device: torch.device
) -> _Given:
    from transformers import AutoTokenizer

    model = random_model(shape, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    stream = TokenStream(
        read_texts(_texts()),
        tokenizer,
        max_length=describe(model).max_positions or batch_tokens,
        max_tokens=tokens,
        window_tokens=tokens,
    )
    return _Given(model, tokenizer, make_batches(stream.window(), 0, batch_tokens))


def _texts() -> Iterator[str]:
    while True:
        yield from bundled.texts()


def _forwards(given: _Given, shape: Shape) -> Callable[[], None]:
    """The forward passes alone, to the last of the layers."""
    model, description = given.model, describe(given.model)
    device = next(model.parameters()).device
    made = [
        (batch.input_ids.to(device), None if batch.mask is None else batch.mask.to(device))
        for batch in given.batches
    ]
    last = get_submodule(model, description.layer(shape.layers[-1]).path)
    base = get_submodule(model, description.base_model_path)

    def end(*_: Any) -> None:
        raise ForwardEnded

    def run() -> None:
        with fused_activations(model):
            for ids, mask in made:
                with partial_forward(last.register_forward_pre_hook(end)):
                    base(input_ids=ids, attention_mask=mask, use_cache=False)

    return run


def _one_pass(given: _Given, shape: Shape) -> Callable[[], None]:
    """The forward passes with the sums of all layers."""
    description = describe(given.model)
    sums = KeySums(given.model, description, [description.layer(i) for i in shape.layers], 0)

    def run() -> None:
        with frozen(given.model), fused_activations(given.model):
            for batch in given.batches:
                sums.add(batch)

    return run


def _pass_case(given: _Given, shape: Shape) -> Case:
    tokens = sum(len(batch.positions) for batch in given.batches)
    return Case(
        op="collect_statistics, the pass",
        shape=f"{shape.name}, {len(shape.layers)} layers, {tokens} tokens",
        dtype=given.model.dtype,
        backend="auto",
        run=_one_pass(given, shape),
        floor=_forwards(given, shape),
        items=tokens,
        warm=1,
        rounds=3,
        cold=False,
    )


def statistics_cases(
    shape: Shape, tokens: int, batch_tokens: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """So many tokens of the bundled text."""
    given = _given(shape, tokens, batch_tokens, dtype, device)
    yield _pass_case(given, shape)
    collect = partial(
        collect_statistics,
        given.model,
        given.tokenizer,
        max_tokens=tokens,
        batch_tokens=batch_tokens,
        progress=False,
    )

    def one_by_one() -> None:
        for layer in shape.layers:
            collect(texts=_texts(), layers=[layer])

    on_host = device.type == "cpu"
    yield Case(
        op="collect_statistics",
        shape=f"{shape.name}, {len(shape.layers)} layers, {tokens} tokens",
        dtype=dtype,
        backend="auto",
        run=lambda: collect(texts=_texts(), layers=shape.layers),
        floor=_forwards(given, shape) if on_host else None,
        peer_name="a pass for each layer" if on_host else "",
        peer=one_by_one if on_host else None,
        items=tokens,
        warm=int(on_host),
        rounds=3 if on_host else 2,
        cold=False,
    )


@benchmark("statistics")
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """One size; on a processor, and when quick, a small one."""
    if quick or device.type != "cuda":
        yield from statistics_cases(_SMALL, 4096, 2048, dtype or torch.float32, device)
    else:
        yield from statistics_cases(GPT_J, 65536, 8192, dtype or torch.bfloat16, device)
