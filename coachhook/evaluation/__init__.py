"""Floor 4: facts files, metrics, tables."""

from __future__ import annotations

from coachhook.evaluation.datasets import FactsFile, load_facts, read_facts
from coachhook.evaluation.fluency import cache_agreement, consistency, ngram_entropy
from coachhook.evaluation.language import measure_language
from coachhook.evaluation.layers import suggest_layers
from coachhook.evaluation.metrics import evaluate, summarise
from coachhook.evaluation.oracle import oracle
from coachhook.evaluation.report import render_evaluation, table

__all__ = [
    "FactsFile",
    "cache_agreement",
    "consistency",
    "evaluate",
    "load_facts",
    "measure_language",
    "ngram_entropy",
    "oracle",
    "read_facts",
    "render_evaluation",
    "suggest_layers",
    "summarise",
    "table",
]
