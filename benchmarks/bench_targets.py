"""Edits per second of whole edits against the published way, alternately in one run.

    python -m benchmarks.bench_targets MODEL FACTS --stats STATS [--known known_ids.json]
                                       [--batch-size 10] [--batches 3] [--json]

MODEL and STATS as for `coachhook edit`, FACTS in any of its formats. Batch after batch of the same
facts is edited by each of: the default preset, the paper preset, and the published way
(benchmarks/published_way.py: one request at a time, whole network, LU for each layer and batch),
each on a model of its own. Statistics are not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics as numbers
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.facts import known_records
from benchmarks.published_way import PublishedWay
from coachhook import EditConfig, Editor, EditRequest, Statistics
from coachhook.evaluation.datasets import load_facts
from coachhook.models import load_model


def facts(path: Path, known: Path | None, model: str) -> list[EditRequest]:
    requests = load_facts(path)
    if known is None:
        return requests
    ids = set(known_records(known, model)["counterfact_case_ids"])
    return [r for r in requests if r.id in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("facts", type=Path)
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--known", type=Path)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    size, count = args.batch_size, args.batch_size * args.batches
    requests = facts(args.facts, args.known, args.model.name)[:count]
    stats = Statistics.load(args.stats)
    systems: dict[str, Any] = {}
    steps: dict[str, list[int]] = {"default": [], "paper": [], "published way": []}
    for name in steps:
        model, tokenizer = load_model(args.model, dtype=torch.float32)
        if name == "published way":
            config = EditConfig.paper(model)
            systems[name] = PublishedWay(model, tokenizer, stats, config)
            steps[name] = systems[name].steps
        else:
            config = (EditConfig.paper if name == "paper" else EditConfig.for_model)(model)
            systems[name] = Editor(model, tokenizer, statistics=stats, config=config)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    differences = []
    for start in range(0, count, size):
        targets = {}
        for name, system in systems.items():
            began = time.perf_counter()
            result = system.edit(requests[start : start + size])
            seconds[name].append(time.perf_counter() - began)
            if isinstance(system, Editor):
                # Adam steps; the forward that ends a target comes on top.
                steps[name] += [s + 1 for s in result.steps]
                result = result.targets
            targets[name] = result
        ours, theirs = targets["paper"], targets["published way"]
        differences += ((ours - theirs).norm(dim=0) / theirs.norm(dim=0)).tolist()
    table = {
        name: {
            "edits_per_second": count / sum(times),
            "seconds_per_batch": times,
            "steps_per_request": numbers.mean(steps[name]),
        }
        for name, times in seconds.items()
    }
    peer = seconds["published way"]
    ratios = {
        name: sorted(b / a for a, b in zip(seconds[name], peer, strict=True))
        for name in ("default", "paper")
    }
    found = {
        "batch_size": size,
        "threads": torch.get_num_threads(),
        "systems": table,
        "faster_than_published_way": ratios,
        "relative_difference_of_paper_targets": {
            "median": numbers.median(differences),
            "largest": max(differences),
        },
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, row in table.items():
        print(
            f"{name:14} {row['edits_per_second']:6.2f} edits/s, "
            f"{row['steps_per_request']:.1f} forwards a request"
        )
    for name, values in ratios.items():
        print(
            f"{name} / published way: {numbers.median(values):.1f} "
            f"({values[0]:.1f} to {values[-1]:.1f} over the batches)"
        )
    print(
        "targets of the paper preset against the published way: relative difference "
        f"{numbers.median(differences):.1e}, at most {max(differences):.1e}"
    )


if __name__ == "__main__":
    main()
