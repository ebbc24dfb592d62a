"""An experiment: what is the same for all of its runs, and the runs, one process each."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

import coachhook
from benchmarks.experiments import checks
from benchmarks.experiments import facts as facts_module
from benchmarks.experiments.systems import TITLES, key_site, statistics_names, uses_statistics
from benchmarks.experiments.worker import open_model, whole_lines
from coachhook.editing import EditConfig, EditRequest
from coachhook.evaluation.language import unrelated_rows
from coachhook.evaluation.metrics import long_prompts
from coachhook.models import KEY_SITES, describe
from coachhook.statistics import Statistics, collect_statistics
from coachhook.store import fingerprint

# Experiment -> systems, batch size, checkpoints.
DEFAULTS: dict[str, tuple[tuple[str, ...], int, tuple[int, ...]]] = {
    "single": (
        ("ours", "paper", "memit", "alphaedit", "fine-tuning", "lora", "grace", "mend", "serac",
         "retrieval"),
        30,
        (),
    ),
    "consecutive": (
        ("ours", "paper", "memit", "accumulated", "alphaedit", "fine-tuning", "lora", "grace",
         "mend", "serac", "retrieval"),
        10,
        (30, 100, 300, 1000),
    ),
    "ablation": (
        ("ours", "no-gate", "paper", "accumulated", "memit"),
        10,
        (10, 20, 30, 50, 70, 100, 150, 200, 300, 400, 500, 700, 1000, 1500),
    ),
    "zscores": (("ours", "paper"), 10, (10, 30, 100, 300, 1000)),
}  # fmt: skip
TRAINING_FACTS = 300


class ExperimentError(Exception):
    """The experiment cannot be run as asked."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process.

    Raises:
        ExperimentError: another process has it.
    """
    if not folder.is_dir():
        raise ExperimentError(f"FOLDER must be that of a run, got {folder}, which is not there")
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExperimentError(f"{folder} is in use by another process") from error
        yield


@dataclass(frozen=True)
class Inputs:
    """What a new experiment is made of, read and checked.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        edited: the facts to edit.
        spare: others, for systems that need training.
        text: passages that name no edited subject.
    """

    model: Any
    tokenizer: Any
    edited: list[EditRequest]
    spare: list[EditRequest]
    text: list[str]


def read_inputs(args: Any) -> Inputs | None:
    """Reads what an experiment is made of and writes nothing; None where the folder has it already.

    Raises:
        OSError: a file or the model cannot be read.
        ValueError: something in it is not what it must be.
    """
    statistics = checks.open_statistics(args)
    if (args.out / "plan.json").is_file():
        return None
    edited, spare = facts_module.gather(
        args.facts,
        known=args.known,
        model=Path(args.model).name,
        count=args.count,
        seed=args.seed,
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = open_model(vars(args))
    checks.check_model(args, model, statistics)
    long = [line for lines in long_prompts(model, tokenizer, edited).values() for line in lines]
    if long:
        raise ValueError(
            f"FACTS must hold prompts that the model can be asked, got {len(long)} that are too "
            f"long: {long[0]}; take those records out"
        )
    text = facts_module.unrelated(args.text, edited, tokenizer, args.text_tokens)
    if not text:
        raise ValueError(
            f"--text must hold a passage that names no edited subject, got none in {args.text}"
        )
    window = describe(model).max_positions
    if not unrelated_rows(tokenizer, text, args.text_tokens, window):
        raise ValueError(
            "--text must hold two tokens in a row that name no edited subject, got none within "
            f"--text-tokens {args.text_tokens} from the end of {args.text}"
        )
    return Inputs(model, tokenizer, edited, spare, text)


def prepare(args: Any, inputs: Inputs | None) -> dict[str, Any]:
    """Facts, unrelated text and statistics of an experiment, made once; what all runs share.

    Args:
        args: of the command.
        inputs: what :func:`read_inputs` read.

    Raises:
        ExperimentError: the folder holds another experiment.
    """
    out: Path = args.out
    plan = {
        "experiment": args.experiment,
        "model": str(args.model),
        "device": args.device,
        "dtype": args.dtype,
        "facts": [str(path) for path in args.facts],
        "known": None if args.known is None else str(args.known),
        "count": args.count,
        "seed": args.seed,
        "text": str(args.text),
        "text_tokens": args.text_tokens,
        "tokens": args.tokens,
        "stats": None if args.stats is None else str(args.stats),
    }
    path = out / "plan.json"
    if path.is_file():
        found = json.loads(path.read_text())
        other = sorted(k for k in plan if found.get(k) != plan[k])
        if other:
            raise ExperimentError(
                f"--out must be a new folder or hold the same experiment, got one in {out} with "
                f"another {', '.join(other)}"
            )
        shared: dict[str, Any] = found
        return shared
    if inputs is None:
        raise ExperimentError(f"{path} was taken away meanwhile; give the command again")
    found_plan = _make(args, plan, inputs)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(found_plan, indent=1))
    fresh.replace(path)
    return found_plan


def _make(args: Any, plan: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Writes facts, text and statistics, and completes the plan."""
    out: Path = args.out
    model, edited, spare = inputs.model, inputs.edited, inputs.spare
    facts_module.write_facts(out / "facts.jsonl", edited)
    facts_module.write_facts(out / "training.jsonl", spare[:TRAINING_FACTS])
    facts_module.write_passages(out / "unrelated.jsonl", inputs.text)
    plan["facts_edited"] = len(edited)
    plan["sources"] = _sources(edited)
    plan["training_facts"] = min(len(spare), TRAINING_FACTS)
    plan |= _statistics(args, model, inputs.tokenizer)
    plan |= {
        "fingerprint": fingerprint(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "architecture": type(model).__name__,
        "versions": _versions(),
    }
    return plan


def _sources(requests: Sequence[EditRequest]) -> dict[str, int]:
    """How many facts have which form: a question, or a sentence to go on with."""
    questions = sum(r.text.rstrip().endswith("?") for r in requests)
    return {"questions": questions, "sentences": len(requests) - questions}


def _statistics(args: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    if args.stats is not None:
        names = statistics_names(Statistics.load(args.stats).key_site)
        return {names[0]: str(args.stats), names[1]: None}
    wanted = {"down_proj": {*describe(model).default_layers(), *EditConfig.for_model(model).layers}}
    for system in args.systems:  # --set may name others
        layers = checks.statistics_layers(args, model, system)
        if layers:
            site = key_site(system, args.settings.get(system, {}))
            wanted.setdefault(site, set()).update(layers)
    made: dict[str, Any] = {}
    for site, chosen in wanted.items():
        name, spent = statistics_names(site)
        begin = time.perf_counter()
        statistics = collect_statistics(
            model, tokenizer, args.text, sorted(chosen), max_tokens=args.tokens, key_site=site
        )
        made[spent] = time.perf_counter() - begin
        statistics.save(args.out / name)
        made[name] = str(args.out / name)
    return made


def _statistics_of(plan: dict[str, Any], system: str, options: dict[str, Any]) -> str:
    """Folder of the statistics of a run; of a system that uses none, of those there are.

    Raises:
        ExperimentError: the experiment was begun without what the system needs.
    """
    name, _ = statistics_names(key_site(system, options))
    if not uses_statistics(system) and name not in plan:
        name = next(n for n, _ in map(statistics_names, KEY_SITES) if n in plan)
    if name not in plan:
        raise ExperimentError(
            f"--out must be a new folder for {system}, got an experiment that was begun without "
            "the statistics it needs"
        )
    return str(plan[name])


def _versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "coachhook": coachhook.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "machine": f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def specs(args: Any, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The spec of every run: each system with each batch size."""
    found = []
    for system in args.systems:
        for size in args.batch_sizes:
            options = dict(args.settings.get(system, {}))
            statistics = _statistics_of(plan, system, options)
            label = f"{system}, batches of {size}" if len(args.batch_sizes) > 1 else system
            found.append(
                {
                    "label": label,
                    "title": TITLES.get(system, system),
                    "system": system,
                    "options": options,
                    "batch_size": size,
                    "checkpoints": sorted(args.checkpoints),
                    "first": args.first or max(size, 10),
                    "sample": args.sample,
                    "save_every": args.save_every,
                    "evaluation_batch": args.evaluation_batch,
                    "facts": str(args.out / "facts.jsonl"),
                    "training": str(args.out / "training.jsonl"),
                    "unrelated": str(args.out / "unrelated.jsonl"),
                    **{
                        name: plan[name]
                        for name in (
                            "experiment", "model", "device", "dtype", "seed", "text_tokens",
                        )
                    },
                    "statistics": statistics,
                }
            )  # fmt: skip
    return found


def run_folder(out: Path, spec: dict[str, Any]) -> Path:
    """Where a run keeps what it does."""
    return out / "runs" / f"{spec['system']}-{spec['batch_size']}"


def run_all(out: Path, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs what is not done yet, one process after the other.

    Returns:
        Per run its ``spec``, and ``final`` or, where it failed, ``error``.

    Raises:
        ExperimentError: a run was begun with other settings.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the runs need it
    results = []
    for spec in found:
        folder = run_folder(out, spec)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "spec.json"
        # How often a run is saved changes nothing in its result.
        if path.is_file():
            old = {**json.loads(path.read_text()), "save_every": spec["save_every"]}
            other = sorted(k for k in spec if old.get(k) != spec[k])
            # What failed before it had done anything has nothing of the other settings.
            if other and any(log.stat().st_size for log in folder.glob("*.jsonl")):
                raise ExperimentError(
                    f"{folder} was begun with another {', '.join(other)}; delete it, or take "
                    "another --out"
                )
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(spec, indent=1))
        fresh.replace(path)
        if not (folder / "final.json").is_file():
            _run_one(folder)
        results.append(read_run(folder))
    return results


def _run_one(folder: Path) -> None:
    (folder / "error.txt").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.experiments", "run", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    tail = b""
    try:
        if process.stderr is not None:
            while block := process.stderr.read1():  # type: ignore[attr-defined]
                sys.stderr.buffer.write(block)
                sys.stderr.buffer.flush()
                tail = (tail + block)[-4000:]
        status = process.wait()
    except KeyboardInterrupt:  # which the run need not have been sent, too
        process.terminate()
        process.wait()
        raise
    if status:
        lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
        reason = lines[-1] if lines and status > 0 else f"killed by signal {-status}"
        (folder / "error.txt").write_text(reason, encoding="utf-8")


def read_run(folder: Path) -> dict[str, Any]:
    """What a run left: its spec, logs, and its result or why there is none."""
    found: dict[str, Any] = {"spec": json.loads((folder / "spec.json").read_text())}
    for name in ("edits", "checkpoints"):
        found[name] = whole_lines(folder / f"{name}.jsonl")
    final, error = folder / "final.json", folder / "error.txt"
    if final.is_file():
        found["final"] = json.loads(final.read_text(encoding="utf-8"))
    else:
        found["error"] = error.read_text(encoding="utf-8") if error.is_file() else "not finished"
    return found


def read_all(out: Path) -> list[dict[str, Any]]:
    """Every run of a folder, in the order of the systems' names here."""
    order = list(TITLES)
    runs = [read_run(path.parent) for path in (out / "runs").glob("*/spec.json")]

    def key(run: dict[str, Any]) -> tuple[float, int]:
        system = run["spec"]["system"]
        place = order.index(system) if system in order else math.inf
        return place, run["spec"]["batch_size"]

    return sorted(runs, key=key)
