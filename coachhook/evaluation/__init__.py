"""Floor 4: facts files, metrics, tables."""

from __future__ import annotations

from coachhook.evaluation.datasets import FactsFile, load_facts, read_facts
from coachhook.evaluation.metrics import evaluate
from coachhook.evaluation.oracle import oracle
from coachhook.evaluation.report import render_evaluation, table

__all__ = [
    "FactsFile",
    "evaluate",
    "load_facts",
    "oracle",
    "read_facts",
    "render_evaluation",
    "table",
]
