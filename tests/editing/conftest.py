from __future__ import annotations

import copy

import pytest
import torch

from coachhook import EditConfig, Editor, EditRequest, collect_statistics
from coachhook.bundled import demo_facts, model_path, texts
from coachhook.models import load_model


@pytest.fixture(scope="session")
def bundled():
    """The bundled model, its tokenizer and statistics of its early layers."""
    model, tokenizer = load_model(model_path(), dtype=torch.float32)
    statistics = collect_statistics(
        model, tokenizer, texts(), layers=[0, 1, 2], max_tokens=20_000, progress=False
    )
    return model, tokenizer, statistics


@pytest.fixture(scope="session")
def requests():
    return [EditRequest.from_dict(fact) for fact in demo_facts()]


@pytest.fixture
def make_editor(bundled):
    """Makes editors on fresh copies of the bundled model."""
    made = []

    def make(preset="default", dtype=torch.float32, **overrides):
        model, tokenizer, statistics = bundled
        model = copy.deepcopy(model).to(dtype)
        build = EditConfig.paper if preset == "paper" else EditConfig.for_model
        editor = Editor(model, tokenizer, statistics=statistics, config=build(model, **overrides))
        made.append(editor)
        return editor, model, tokenizer

    yield make
    for editor in made:
        editor.detach()
