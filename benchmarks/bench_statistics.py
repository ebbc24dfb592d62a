"""Key statistics of all layers in one pass, against one pass per layer in the published way.

    python benchmarks/bench_statistics.py MODEL TEXT [--tokens 20000] [--repeats 5] [--json]

The peer does per layer what the published code does (`layer_stats` of ROME and MEMIT, Meng et al.,
which the CoachHooK code calls): every text is tokenised by itself, groups of 100 texts in random
order are sorted by length and cut into batches of up to three context windows of tokens, position
ids and an attention mask are passed, the forward ends when the layer has been computed
(`Trace(stop=True)` is a hook after the layer, so the down-projection itself runs too), and the keys
of real tokens are added up in float32, the precision of its hyper-parameter files. "whole" is the
same with forwards that go on to the logits. All run alternately in one process; times are CPU
seconds of the process, so that other work on the machine hardly counts. The results must agree to
1e-4 before anything is timed.

"bound" is the ratio that the passes alone allow: a forward to layer l is l + 1 blocks, so a pass
for each of the layers S costs sum over S of (l + 1), and one pass max(S) + 1. The sums of k k^T are
over the same tokens in both and pull the ratio towards 1; taking only one half of them pulls it up.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coachhook import collect_statistics
from coachhook.models import describe, get_submodule, load_model
from coachhook.statistics import read_texts

_GROUP = 100


class _Stop(Exception):
    pass


def _published_batches(
    tokenizer: Any, texts: Sequence[str], window: int
) -> Iterator[list[list[int]]]:
    order = random.Random(1).sample(range(len(texts)), len(texts))
    for first in range(0, len(texts), _GROUP):
        ids = [
            tokenizer(texts[i], truncation=True, max_length=window)["input_ids"]
            for i in order[first : first + _GROUP]
        ]
        ids.sort(key=len, reverse=True)
        batch: list[list[int]] = []
        for sequence in ids:
            if batch and len(batch[0]) * (len(batch) + 1) > 3 * window:
                yield batch
                batch = []
            batch.append(sequence)
        yield batch


def one_pass_per_layer(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    stop: bool = True,
) -> dict[int, Tensor]:
    """Layer -> mean of k k^T, float32 [n, n]."""
    description = describe(model)
    window = description.max_positions or tokenizer.model_max_length
    result = {}
    for index in layers:
        layer = description.layer(index)
        seen: list[Tensor] = []

        def hook(module: nn.Module, arguments: Any, output: Any, seen: list[Tensor] = seen) -> None:
            seen.append(arguments[0])
            if stop:
                raise _Stop

        handle = get_submodule(model, layer.path).register_forward_hook(hook)
        moment, tokens = torch.zeros(layer.in_features, layer.in_features), 0
        for batch in _published_batches(tokenizer, texts, window):
            width = len(batch[0])
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, sequence in enumerate(batch):
                ids[row, : len(sequence)] = torch.tensor(sequence)
                mask[row, : len(sequence)] = 1
            positions = torch.arange(width).expand_as(ids) * mask
            try:
                with torch.no_grad():
                    model(input_ids=ids, attention_mask=mask, position_ids=positions)
            except _Stop:
                pass
            keys = seen.pop().reshape(-1, layer.in_features)[mask.reshape(-1).nonzero()[:, 0]]
            keys = keys.float()
            moment += keys.T.mm(keys)
            tokens += len(keys)
        handle.remove()
        result[index] = moment / tokens
    return result


def _texts_of(path: str, tokenizer: Any, tokens: int) -> tuple[list[str], int]:
    """The first texts of a source that hold at least so many tokens."""
    texts: list[str] = []
    total = 0
    for text in read_texts(path):
        if total >= tokens:
            break
        texts.append(text)
        total += len(tokenizer(text)["input_ids"])
    return texts, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("text", help="text file or folder")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--layers", type=lambda s: [int(i) for i in s.split(",")], default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model, tokenizer = load_model(arguments.model, dtype="float32")
    layers = arguments.layers or list(range(describe(model).num_layers))
    texts, tokens = _texts_of(arguments.text, tokenizer, arguments.tokens)

    def ours() -> Mapping[int, Tensor]:
        return collect_statistics(model, tokenizer, texts, layers, progress=False).covariances

    providers: dict[str, Callable[[], Mapping[int, Tensor]]] = {
        "one pass": ours,
        "published, one pass per layer": lambda: one_pass_per_layer(
            model, tokenizer, texts, layers
        ),
        "whole pass per layer": lambda: one_pass_per_layer(
            model, tokenizer, texts, layers, stop=False
        ),
    }
    results = {name: provider() for name, provider in providers.items()}
    for name, covariances in results.items():
        for layer in layers:
            expected = results["one pass"][layer]
            error = torch.linalg.norm(covariances[layer] - expected) / torch.linalg.norm(expected)
            if not error < 1e-4:
                raise SystemExit(f"{name}: layer {layer} differs by {float(error):.1e}")

    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(arguments.repeats):
        for name, provider in providers.items():
            start = time.process_time()
            provider()
            times[name].append(time.process_time() - start)

    best = times["one pass"]
    bound = sum(layer + 1 for layer in layers) / (max(layers) + 1)
    rows = []
    for name, seconds in times.items():
        ratios = [other / own for other, own in zip(seconds, best, strict=True)]
        rows.append(
            {
                "op": "collect_statistics",
                "provider": name,
                "model": arguments.model,
                "layers": layers,
                "bound_of_passes": bound,
                "tokens": tokens,
                "median_s": statistics.median(seconds),
                "tokens_per_s": tokens / statistics.median(seconds),
                "ratio": statistics.median(ratios),
                "ratio_per_layer": statistics.median(ratios) / len(layers),
            }
        )
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        f"layers {layers}, {tokens} tokens, 1 thread, CPU seconds; bound of the passes alone "
        f"x {bound:.2f} = {bound / len(layers):.2f} x layers"
    )
    for row in rows:
        print(
            f"{row['provider']:34} {row['median_s']:8.2f} s {row['tokens_per_s']:8.0f} tok/s  "
            f"x {row['ratio']:.2f} = {row['ratio_per_layer']:.2f} x layers"
        )


if __name__ == "__main__":
    main()
