"""A small experiment on the bundled model, shared by the tests of the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.experiments import plan, worker
from benchmarks.experiments.__main__ import build_parser, settings_of
from coachhook import bundled


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with facts, text and key statistics of the bundled model."""
    root = tmp_path_factory.mktemp("experiments")
    step = len(bundled.facts()) // 12
    facts = [{**record, "id": i} for i, record in enumerate(bundled.facts()[::step][:12])]
    (root / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
    (root / "text.txt").write_text("\n".join(bundled.texts()[:900]), encoding="utf-8")
    run(root, "consecutive", root / "stats-only", "--count", 1, only_plan=True)
    return root


def words(world, experiment, out, *more):
    argv = [experiment, bundled.model_path(), world / "facts.jsonl", "--text", world / "text.txt"]
    argv += ["--out", out, "--text-tokens", 400, *more]
    if (world / "stats-only" / "plan.json").is_file():
        argv += ["--stats", world / "stats-only" / "statistics"]
    return [str(a) for a in [*argv, "--tokens", 6000]]


def parse(argv):
    """Arguments as the program reads them."""
    args = build_parser().parse_args(argv)
    args.settings = settings_of(args.changes)
    return args


def run(world, experiment, out, *more, only_plan=False):
    """An experiment without processes of its own: the runs one after the other, in this one."""
    args = parse(words(world, experiment, out, *more))
    inputs = plan.read_inputs(args)
    Path(out).mkdir(parents=True, exist_ok=True)
    shared = plan.prepare(args, inputs)
    for spec in [] if only_plan else plan.specs(args, shared):
        folder = plan.run_folder(Path(out), spec)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.json").write_text(json.dumps(spec))
        worker.main(folder)
    return shared
