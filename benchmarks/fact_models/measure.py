"""What a model knows of given records: `python -m benchmarks.fact_models.measure --model DIR ...`.

Prints the shares of prompts after which every token of the true object is the most likely one, and
the swap test per layer. `--known FILE` adds the records known by their own prompt to a file for
`--known` of the benchmarks, under the name of the model's folder.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bundled_model.measure import Measurement, Pair, Query
from benchmarks.fact_models.text import LONGEST_LOCALITY, load, wording
from benchmarks.fact_models.train import places

SWAP_PAIRS = 200
NOTE = (
    "counterfact_case_ids: all tokens of the true object are the most likely ones after the "
    "rewrite prompt (float32); zsre_index: place in the zsRE file from 0, the same after src for "
    "answers[0]; neighborhood_known: per case_id a 0 or 1 for each neighbourhood prompt"
)


def swap_pairs(rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """Two subjects of a relation with different objects, in the first one's rewrite prompt."""
    rng = random.Random(0)
    by_relation: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        rewrite = row["requested_rewrite"]
        by_relation[rewrite["relation_id"]].append(rewrite)
    pairs: list[Pair] = []
    for row in rng.sample(list(rows), min(len(rows), 2 * SWAP_PAIRS)):
        first = row["requested_rewrite"]
        second = rng.choice(by_relation[first["relation_id"]])
        if first["target_true"]["str"] != second["target_true"]["str"]:
            answer = second["target_true"]["str"]
            pairs.append((first["prompt"], first["subject"], second["subject"], answer))
    return pairs[:SWAP_PAIRS]


def measure(
    folder: Path, rows: Sequence[dict[str, Any]], asked: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[bool], list[bool], list[list[int]]]:
    """The shares, which records are known (CounterFact, zsRE), and each one's neighbours known."""
    model = Measurement(folder)
    rewrites = [r["requested_rewrite"] for r in rows]
    prompts = [r["prompt"].replace("{}", r["subject"]) for r in rewrites]
    rewrite = [(p, _true(r)) for p, r in zip(prompts, rows, strict=True)]
    questions = [(r["src"], r["answers"][0].strip()) for r in asked]
    records, known = model.correct(rewrite), model.correct(questions)
    around = [(p, _true(r)) for r in rows for p in r["neighborhood_prompts"]]
    hits = iter(model.correct(around))
    neighbours = [[int(next(hits)) for _ in r["neighborhood_prompts"]] for r in rows]
    bare: list[Query] = []
    for row in rows:
        subject = row["requested_rewrite"]["subject"]
        for prompt in row["paraphrase_prompts"]:
            found = wording(prompt, subject)
            if found is not None:
                bare.append((found[1].replace("{}", subject), _true(row)))
    short = [r for r in asked if len(r["loc_ans"].split()) <= LONGEST_LOCALITY]
    new = [(p, r["target_new"]["str"].strip()) for p, r in zip(prompts, rewrites, strict=True)]
    result: dict[str, Any] = {
        "records": len(rows),
        "rewrite": _share(records),
        "paraphrase_0": model.share([(r["paraphrase_prompts"][0], _true(r)) for r in rows]),
        "paraphrase_1": model.share([(r["paraphrase_prompts"][1], _true(r)) for r in rows]),
        "paraphrase_without_lead_in": model.share(bare),
        "neighborhood_0": _share([bool(n[0]) for n in neighbours if n]),
        "neighborhood": _share([bool(k) for n in neighbours for k in n]),
        "rewrite_gives_target_new": model.share(new),
        "questions": len(asked),
        "src": _share(known),
        "rephrase": model.share([(r["rephrase"], r["answers"][0].strip()) for r in asked]),
        "loc": model.share([(r["loc"], r["loc_ans"]) for r in asked]),
        "loc_short": model.share([(r["loc"], r["loc_ans"]) for r in short]),
        "swap_by_layer": model.swap(swap_pairs(rows)),
        "left_padding_equal": model.left_padding(rewrite),
    }
    model.model.to(torch.bfloat16)
    result["rewrite_bfloat16"] = model.share(rewrite)
    return result, records, known, neighbours


def _true(row: dict[str, Any]) -> str:
    answer: str = row["requested_rewrite"]["target_true"]["str"]
    return answer.strip()


def _share(found: Sequence[bool]) -> float:
    return round(sum(found) / len(found), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the model")
    add("--counterfact", type=Path, required=True, help="CounterFact file")
    add("--records", type=places, required=True, help="its records to ask, like 501-2000")
    add("--zsre", type=Path, required=True, help="zsRE file")
    add("--questions", type=places, required=True, help="its records to ask, like 251-650")
    add("--known", type=Path, help="file to which the known records are added")
    arguments = parser.parse_args()
    rows = load(arguments.counterfact, arguments.records)
    asked = load(arguments.zsre, arguments.questions)
    result, records, known, neighbours = measure(arguments.model, rows, asked)
    print(json.dumps(result, indent=2))
    if arguments.known is not None:
        listing = json.loads(arguments.known.read_text()) if arguments.known.exists() else {}
        ids = [row["case_id"] for row in rows]
        listing[arguments.model.name] = {
            "counterfact_case_ids": [i for i, k in zip(ids, records, strict=True) if k],
            "zsre_index": [i for i, k in zip(arguments.questions, known, strict=True) if k],
            "neighborhood_known": {str(i): n for i, n in zip(ids, neighbours, strict=True)},
        }
        listing["note"] = NOTE
        arguments.known.write_text(json.dumps(listing) + "\n")


if __name__ == "__main__":
    main()
