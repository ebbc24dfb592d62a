"""The table of docs/quality.md: edit facts a model knows with the command line, and measure.

    python benchmarks/quality.py MODEL FACTS --known known_ids.json --text corpus.txt --work DIR
                                 [-- options of `coachhook edit`]

FACTS is a CounterFact file; `--known` lists per model the case ids it knows (without it, all are
taken). Everything else is `coachhook stats | edit | eval`, and the commands are printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def coachhook(*words: str) -> str:
    """Runs one command of the command line and returns what it printed."""
    print("$ coachhook", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "coachhook", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it has said why
        sys.exit(done.returncode)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("facts", type=Path)
    parser.add_argument("--known", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--tokens", default="60000")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--preset", default="default")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args, options = parser.parse_args(words[:cut]), words[cut + 1 :]

    records = json.loads(args.facts.read_text())
    if args.known:
        known = json.loads(args.known.read_text())[args.model.name]["counterfact_case_ids"]
        records = [r for r in records if r["case_id"] in set(known)]
    args.work.mkdir(parents=True, exist_ok=True)
    chosen = f"{args.start}-{args.count}"
    name = "-".join([args.model.name, args.preset, args.dtype, chosen, *options]).replace("--", "")
    facts = args.work / f"{args.model.name}-{chosen}.json"
    facts.write_text(json.dumps(records[args.start : args.start + args.count]))
    stats = args.work / f"{args.model.name}-{args.dtype}-{args.text.name}-{args.tokens}-stats"
    model, edits = str(args.model), str(args.work / name)
    shared = ["--dtype", args.dtype, "--json"]
    if not stats.is_dir():
        text = ["--text", str(args.text), "--tokens", args.tokens, "--layers", "0,1,2"]
        coachhook("stats", model, *text, "--out", str(stats), *shared)
    started = time.perf_counter()  # the commands are processes of their own
    preset = ["--preset", args.preset, *options]
    where = ["--stats", str(stats), "--out", edits]
    edited = json.loads(coachhook("edit", model, str(facts), *where, *preset, *shared))
    found = json.loads(coachhook("eval", model, str(facts), "--edits", edits, "--oracle", *shared))
    found["edit"] = {k: edited[k] for k in ("edits", "batches", "seconds", "alphas")}
    found["edit"]["not_converged"] = len(edited["not_converged"])
    found["seconds"] = time.perf_counter() - started
    (args.work / f"{name}.json").write_text(json.dumps(found, indent=1))
    forced, free = found["teacher_forced"]["after"], found["generated"]["after"]
    cells = [forced[k] for k in ("reliability", "generality", "locality")]
    cells += [free[k] for k in ("reliability", "generality", "locality")]
    cells += [found["oracle"][k] for k in ("reliability", "generality")]
    cells += [found["gate"]["fired_unrelated"]]
    print(f"| {name} | " + " | ".join("-" if c is None else f"{c:.3f}" for c in cells) + " |")


if __name__ == "__main__":
    main()
