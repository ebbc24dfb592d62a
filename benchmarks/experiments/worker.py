"""One run in its own process: one system, one batch size, from wherever it was cut off.

A run is a folder. `spec.json` says what to do; `edits.jsonl`, `checkpoints.jsonl` and, for single
rounds, `rounds.jsonl` grow while it goes on; `state` holds the edits of the last save; `final.json`
is written at the end, whole. A process of its own gives the run its own peak memory, and a system
that fails takes no other with it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.experiments import facts as facts_module
from benchmarks.experiments import measure
from benchmarks.experiments.memory import process_peak
from benchmarks.experiments.systems import TRAINED, Other, System, make_system, state_there
from coachhook.editing import EditRequest
from coachhook.models import load_model
from coachhook.statistics import Statistics, read_texts


class Run:
    """The folder of a run and what belongs to it.

    Args:
        folder: holds `spec.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec: dict[str, Any] = json.loads((folder / "spec.json").read_text())
        self.model, self.tokenizer = open_model(self.spec)
        self.statistics = Statistics.load(self.spec["statistics"])
        self.requests = facts_module.load_written(Path(self.spec["facts"]))
        self.text = list(read_texts(self.spec["unrelated"]))
        self.start_memory = peak_memory(self.spec)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a log; one that a kill cut short is dropped."""
        return whole_lines(self.folder / name)

    def keep(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        """Replaces a log."""
        path = self.folder / name
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        fresh.replace(path)

    def add(self, name: str, line: dict[str, Any]) -> None:
        """Appends a line to a log, in the place of one that a kill cut short."""
        path = self.folder / name
        path.touch()
        with path.open("r+b") as stream:
            stream.seek(path.read_bytes().rfind(b"\n") + 1)
            stream.truncate()
            stream.write(f"{json.dumps(line)}\n".encode())
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self, result: dict[str, Any]) -> None:
        """Writes `final.json`; the run is done."""
        fresh = self.folder / "final.new"
        fresh.write_text(json.dumps(result), encoding="utf-8")
        fresh.replace(self.folder / "final.json")

    def system(self, state: Path | None = None) -> System:
        """The system of the run on the model; its networks, if it has any, are trained once."""
        spec, options = self.spec, dict(self.spec["options"])
        networks = self.folder / "networks"
        if spec["system"] in TRAINED and "networks" not in options:
            if networks.exists():
                options["networks"] = str(networks)
            else:
                options["train_requests"] = facts_module.load_written(Path(spec["training"]))
        begin = time.perf_counter()
        system = make_system(
            spec["system"], self.model, self.tokenizer, self.statistics, options, state
        )
        if "train_requests" in options and isinstance(system, Other):
            # Not added: a kill before the networks are written has them trained again.
            self.keep("training.jsonl", [{"seconds": time.perf_counter() - begin}])
            system.baseline.save_networks(networks)  # type: ignore[attr-defined]
        return system


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole; none where it is not there."""
    if not path.is_file():
        return []
    found = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in found if line.endswith("\n")]


def open_model(spec: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer of a spec."""
    dtype = None if spec["dtype"] == "auto" else spec["dtype"]
    return load_model(spec["model"], device=spec["device"], dtype=dtype)


def peak_memory(spec: dict[str, Any]) -> float:
    """Largest memory so far in MiB: of the GPU where one is used, else of the process."""
    if spec["device"].startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return process_peak()


def say(message: str) -> None:
    """Progress, to stderr."""
    print(message, file=sys.stderr, flush=True)


def run_consecutive(run: Run) -> None:
    """Edits batch after batch; measures at the checkpoints and, in full, at the end."""
    spec, requests = run.spec, run.requests
    size, state = spec["batch_size"], run.folder / "state"
    system = run.system(state if state_there(state) else None)
    done = system.done
    run.keep("edits.jsonl", [e for e in run.lines("edits.jsonl") if e["edits"] <= done])
    run.keep("checkpoints.jsonl", [c for c in run.lines("checkpoints.jsonl") if c["edits"] <= done])
    if done:
        say(f"{spec['label']}: goes on after {done} facts")
    saved = time.monotonic()
    measured = {c["edits"] for c in run.lines("checkpoints.jsonl")}
    seconds = sum(e["seconds"] for e in run.lines("edits.jsonl"))
    for number, batch in enumerate(facts_module.batches(requests, size)):
        start, end = number * size, number * size + len(batch)
        # Batches need not end on a checkpoint: the first one past it counts.
        passed = end < len(requests) and any(start < c <= end for c in spec["checkpoints"])
        if end > done:
            seconds += _edit(run, system, number, batch)
            done = end
            say(f"{spec['label']}: {done}/{len(requests)} facts, {done / seconds:.2f} edits/s")
            if (passed or time.monotonic() - saved > spec["save_every"]) and system.save(state):
                saved = time.monotonic()
        if passed and end == done and end not in measured:
            begin = time.perf_counter()
            found = measure.checkpoint(run, system, requests[:done])
            found |= {"edits": done, "measuring_seconds": time.perf_counter() - begin}
            run.add("checkpoints.jsonl", found)
    system.save(state)
    final = measure.final(run, system)
    final["settings"] = system.settings
    run.finish({**final, **cost(run)})
    system.close()


def _edit(run: Run, system: System, number: int, batch: Sequence[EditRequest]) -> float:
    """Edits one batch and logs it; the seconds it took."""
    # The same seed for a batch, whether or not the run was cut off before it.
    torch.manual_seed(run.spec["seed"] + number)
    outcome = system.edit(batch)
    line = {
        "batch": number,
        "edits": number * run.spec["batch_size"] + len(batch),
        "facts": len(batch),
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "converged": sum(outcome.converged),
        "alphas": outcome.alphas,
        "peak_mib": peak_memory(run.spec),
    }
    run.add("edits.jsonl", line)
    return outcome.seconds


def run_single(run: Run) -> None:
    """Every batch on the unedited model, measured, taken off again."""
    spec = run.spec
    rounds = run.lines("rounds.jsonl")
    todo = list(facts_module.batches(run.requests, spec["batch_size"]))
    settings: dict[str, Any] = rounds[0]["settings"] if rounds else {}
    for number, batch in enumerate(todo):
        if number < len(rounds):
            continue
        system = run.system()
        run.keep("edits.jsonl", [e for e in run.lines("edits.jsonl") if e["batch"] < number])
        _edit(run, system, number, batch)
        settings = system.settings
        found = measure.full(run, system, list(batch))
        kept = {"records": found["records"], "gate": found["gate"], "settings": settings}
        if number == 0:  # the last round may be a smaller batch
            kept["extra"] = measure.side_effects(run, system, list(batch))
        system.close()
        run.add("rounds.jsonl", kept)
        say(f"{spec['label']}: round {number + 1}/{len(todo)}")
    final = measure.merge_rounds(run.lines("rounds.jsonl"))
    run.finish({**final, "settings": settings, **cost(run)})


def cost(run: Run) -> dict[str, Any]:
    """Time and memory of a run from its log."""
    log = run.lines("edits.jsonl")
    return {
        "edit_seconds": sum(e["seconds"] for e in log),
        "edit_cpu_seconds": sum(e["cpu_seconds"] for e in log),
        "converged": sum(e["converged"] for e in log) / sum(e["facts"] for e in log),
        "alphas": log[-1]["alphas"],
        "training_seconds": sum(t["seconds"] for t in run.lines("training.jsonl")),
        "peak_mib": max([peak_memory(run.spec), *(e["peak_mib"] for e in log)]),
        "start_mib": run.start_memory,
    }


def main(folder: Path) -> None:
    """Does what the spec of ``folder`` says."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run = Run(folder)
    say(f"{run.spec['label']}: {len(run.requests)} facts, batches of {run.spec['batch_size']}")
    if run.spec["experiment"] == "single":
        run_single(run)
    else:
        run_consecutive(run)
