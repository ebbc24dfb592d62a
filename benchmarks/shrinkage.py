"""What shrinkage of few tokens' key statistics is worth, on held-out text.

    python benchmarks/shrinkage.py MODEL TEXT [--layer 0] [--per-feature 0.5,1,2,10]

For every number of tokens N (so many per feature) the second moment S of the first N keys is made
into a prior in several ways. An edit of key e with prior C writes along ``d = C^-1 e / e^T C^-1 e``
(the limit of a heavy prior), and an unrelated key k is moved by ``(d^T k)^2`` of the correction:
the median over 300 held-out keys e of its mean over all other held-out keys is printed, 1 / 1000,
with the share rho where there is one. "best" is the least over a grid of rho, seen with the
held-out keys. All with the ridge of the default preset.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coachhook.models import describe, get_submodule, load_model
from coachhook.statistics import collect_statistics, read_texts
from coachhook.statistics.shrinkage import shrink_

_RIDGE = 1e-6
_EDITED = 300
_GRID = [0.0, 0.001, 0.003, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7]


def keys_of(model: Any, tokenizer: Any, texts: Sequence[str], layer: int) -> tuple[Tensor, Tensor]:
    """Keys float64 [N, n] and the number of the text of each."""
    found: list[Tensor] = []
    owners: list[int] = []
    module = get_submodule(model, describe(model).layer(layer).path)
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0][0].double()))
    with torch.no_grad():
        for number, text in enumerate(texts):
            model(torch.tensor([tokenizer(text)["input_ids"]]))
            owners += [number] * len(found[-1])
    handle.remove()
    return torch.cat(found), torch.tensor(owners)


def ledoit_wolf(keys: Tensor, moment: Tensor) -> float:
    """Towards a multiple of the identity, tokens taken as independent (Ledoit and Wolf 2004)."""
    count, n = keys.shape
    distance = (moment - moment.diagonal().mean() * torch.eye(n, dtype=moment.dtype)).square().sum()
    noise = (keys.square().sum(1).square().sum() - count * moment.square().sum()) / count**2
    return float((noise / distance).clamp(max=1))


def oas(keys: Tensor, moment: Tensor) -> float:
    """Towards a multiple of the identity, keys taken as Gaussian (Chen et al. 2010, eq. 23)."""
    count, n = keys.shape
    square, trace = moment.square().sum(), moment.trace()
    above = (1 - 2 / n) * square + trace**2
    return float((above / ((count + 1 - 2 / n) * (square - trace**2 / n))).clamp(max=1))


def halves(keys: Tensor, owners: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, int, int]:
    """What :func:`shrink_` needs, for a random half of the texts."""
    draw = torch.rand(int(owners.max()) + 1, generator=torch.Generator().manual_seed(seed))
    one, two = keys[draw[owners] < 0.5], keys[draw[owners] >= 0.5]
    means = torch.stack([one.mean(0), two.mean(0)])
    return one.T @ one / len(one), means, len(one), len(two)


def leak(prior: Tensor, edited: Tensor, moment: Tensor) -> float:
    """Median over the edited keys of the mean of (d^T k)^2 over keys of that moment."""
    ridge = _RIDGE * prior.diagonal().mean() * torch.eye(len(prior), dtype=prior.dtype)
    solved = torch.linalg.solve(prior + ridge, edited.T)
    directions = solved / (edited.T * solved).sum(0)
    return float(((moment @ directions) * directions).sum(0).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--per-feature", default="0.5,1,2,10")
    parser.add_argument("--held-out", type=int, default=1500, help="texts, the last ones")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model, tokenizer = load_model(arguments.model, dtype="float32")
    n = describe(model).layer(arguments.layer).in_features
    counts = [round(float(c) * n) for c in arguments.per_feature.split(",")]
    texts = list(read_texts(arguments.text))
    held_out, _ = keys_of(model, tokenizer, texts[-arguments.held_out :], arguments.layer)
    edited, other = held_out[:_EDITED], held_out[_EDITED:]
    truth = other.T @ other / len(other)
    needed = collect_statistics(
        model, tokenizer, texts, [arguments.layer], max(counts), sample_size=0, progress=False
    )
    keys, owners = keys_of(model, tokenizer, texts[: needed.meta["texts"]], arguments.layer)
    print(f"{arguments.model}, layer {arguments.layer}, n = {n}, {len(held_out)} held-out keys")
    print("| tokens | none | Ledoit-Wolf | OAS | coachhook | best rho |")
    print("|---|---|---|---|---|---|")
    for count in counts:
        k = keys[:count]
        moment = k.T @ k / count
        eye = moment.diagonal().mean() * torch.eye(n, dtype=moment.dtype)
        mean = k.mean(0)
        centred = moment - torch.outer(mean, mean)
        off = centred - torch.diag(centred.diagonal())
        cells = [f"{1e3 * leak(moment, edited, truth):.2f}"]
        for share in (ledoit_wolf(k, moment), oas(k, moment)):
            found = leak((1 - share) * moment + share * eye, edited, truth)
            cells.append(f"{1e3 * found:.2f} ({share:.4f})")
        ours = moment.clone()
        share = shrink_(ours, *halves(k, owners[:count]))
        cells.append(f"{1e3 * leak(moment - share * off, edited, truth):.2f} ({share:.4f})")
        best, rho = min((leak(moment - rho * off, edited, truth), rho) for rho in _GRID)
        cells.append(f"{1e3 * best:.2f} ({rho:g})")
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
