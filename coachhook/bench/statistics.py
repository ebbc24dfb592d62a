"""Key statistics of a model with random weights: one pass for all layers, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from coachhook import bundled
from coachhook.bench.model import GPT_J, SMALL_GPT_J, Shape, random_model
from coachhook.bench.runner import Case, benchmark
from coachhook.models import ForwardEnded, describe, get_submodule, partial_forward
from coachhook.statistics import collect_statistics
from coachhook.statistics.batches import TokenStream, make_batches
from coachhook.statistics.texts import read_texts

# The vocabulary is the bundled tokenizer's.
_SMALL = SMALL_GPT_J._replace(sizes={**SMALL_GPT_J.sizes, "vocab_size": 1792})


def _passes(
    model: Any, tokenizer: Any, layers: Sequence[int], tokens: int, batch_tokens: int
) -> Callable[[], None]:
    """The forward passes alone, to the last of the layers, over batches made beforehand."""
    description = describe(model)
    stream = TokenStream(
        read_texts(bundled.texts()),
        tokenizer,
        max_length=description.max_positions or batch_tokens,
        max_tokens=tokens,
        window_tokens=tokens,
    )
    device = next(model.parameters()).device
    made = [
        (batch.input_ids.to(device), None if batch.mask is None else batch.mask.to(device))
        for batch in make_batches(stream.window(), 0, batch_tokens)
    ]
    last = get_submodule(model, description.layer(layers[-1]).path)
    base = get_submodule(model, description.base_model_path)

    def end(*_: Any) -> None:
        raise ForwardEnded

    def run() -> None:
        for ids, mask in made:
            with partial_forward(last.register_forward_pre_hook(end)):
                base(input_ids=ids, attention_mask=mask, use_cache=False)

    return run


def statistics_case(
    shape: Shape, tokens: int, batch_tokens: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """So many tokens of the bundled text."""
    from transformers import AutoTokenizer

    model = random_model(shape, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    texts = bundled.texts()
    collect = partial(
        collect_statistics,
        model,
        tokenizer,
        texts,
        max_tokens=tokens,
        batch_tokens=batch_tokens,
        progress=False,
    )

    def one_by_one() -> None:
        for layer in shape.layers:
            collect(layers=[layer])

    return Case(
        op="collect_statistics",
        shape=f"{shape.name}, {len(shape.layers)} layers, {tokens} tokens",
        dtype=dtype,
        backend="auto",
        run=partial(collect, layers=shape.layers),
        floor=_passes(model, tokenizer, shape.layers, tokens, batch_tokens),
        peer_name="a pass for each layer",
        peer=one_by_one,
        items=tokens,
        warm=1,
        rounds=3,
        cold=False,
    )


@benchmark("statistics")
def cases(device: torch.device, dtype: torch.dtype | None, quick: bool) -> Iterator[Case]:
    """One size; on a processor, and when quick, a small one."""
    if quick or device.type != "cuda":
        yield statistics_case(_SMALL, 4096, 2048, dtype or torch.float32, device)
    else:
        yield statistics_case(GPT_J, 32768, 8192, dtype or torch.bfloat16, device)
