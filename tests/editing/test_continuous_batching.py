"""Requests of continuous batching answer with edits as `generate` does, one after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.generation import continuous_batching

import coachhook as ch

from ..hooks.support import together


@pytest.fixture(scope="module")
def folders(bundled, requests, tmp_path_factory):
    """Two folders of edits of the bundled model, each of other facts, with the default preset."""
    model, tokenizer, statistics = bundled
    root = tmp_path_factory.mktemp("edits")
    for name, facts in (("first", requests[:5]), ("second", requests[5:10])):
        editor = ch.Editor(copy.deepcopy(model), tokenizer, statistics=statistics)
        assert all(editor.edit(facts).converged)
        editor.save(root / name)
    return root / "first", root / "second"


@pytest.fixture
def served(bundled, folders):
    model = copy.deepcopy(bundled[0])
    with ch.attach(model, folders[0]) as handle:
        assert all(layer.cues() for layer in handle.hooks.values())
        yield model, handle


@pytest.fixture(scope="module")
def rows(bundled, requests) -> list[torch.Tensor]:
    """Prompts about edited and other facts, some behind a long text that they share."""
    tokenizer = bundled[1]
    # Of either folder and of neither.
    some = [*requests[:4], *requests[5:7], requests[10]]
    asked = [request.prompt.format(request.subject) for request in some]
    asked += [wording for request in some for wording in request.paraphrases[:2]]
    asked += [wording for request in some for wording in request.neighborhood[:1]]
    before = ". ".join(request.prompt.format(request.subject) for request in requests[10:13])
    texts = [*asked, *(f"{before}. {text}" for text in asked[:6])]
    return [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]


def _alone(model: Any, rows: list[torch.Tensor], new: int = 8, **settings: Any) -> list[list[int]]:
    found = []
    for row in rows:
        ids = row[None]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
        found.append(out[0, len(row) :].tolist())
    return found


def _batched(model: Any, rows: list[torch.Tensor], new: int = 8, **settings: Any) -> Any:
    generation = {"max_new_tokens": new, "eos_token_id": 0} | settings.pop("generation", {})
    answers = together(model, rows, generation=generation, **settings)
    assert {answer.error for answer in answers} == {None}
    return [answer.generated_tokens for answer in answers]


@pytest.fixture(scope="module")
def one_by_one(bundled, folders, rows) -> tuple[list[list[int]], list[list[int]]]:
    """What `generate` answers with the first edits, and without any."""
    model = copy.deepcopy(bundled[0])
    with ch.attach(model, folders[0]):
        edited = _alone(model, rows)
    return edited, _alone(model, rows)


@pytest.mark.parametrize(
    "size",
    [
        {"page": 4, "blocks": 64, "batch": 24},
        {"page": 4, "blocks": 200, "batch": 8},
        {"page": 16, "blocks": 16, "batch": 64},
        {"page": 32, "blocks": 64, "batch": 256},
    ],
)
def test_answers_are_those_of_one_request_at_a_time(
    served, rows, one_by_one, size: dict[str, int]
) -> None:
    model, handle = served
    wanted, plain = one_by_one
    assert _batched(model, rows, **size) == wanted
    with handle.disabled():
        assert _batched(model, rows, **size) == plain
    changed = sum(one != other for one, other in zip(wanted, plain, strict=True))
    assert 10 < changed < len(rows) - 10


def test_requests_that_are_thrown_out_and_read_again(
    served, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = pytest.importorskip(f"{continuous_batching.__name__}.offloading_manager")
    throw_out, thrown = manager.OffloadingManager.offload_requests, []

    def watched(self: Any) -> Any:
        thrown.append(throw_out(self))
        return thrown[-1]

    monkeypatch.setattr(manager.OffloadingManager, "offload_requests", watched)
    model, _ = served
    endless, few = {"eos_token_id": -1}, rows[:10]
    sizes = {"page": 4, "blocks": 24, "batch": 128, "generation": endless}
    assert _batched(model, few, 30, **sizes) == _alone(model, few, 30, **endless)
    assert any(thrown)


def test_edits_are_swapped_between_two_calls(served, rows, folders) -> None:
    model, handle = served
    sizes = {"page": 4, "blocks": 64, "batch": 24}
    first = _batched(model, rows, **sizes)
    handle.swap(folders[1])
    second = _batched(model, rows, **sizes)
    assert second == _alone(model, rows) != first
    handle.swap(folders[0])
    assert _batched(model, rows, **sizes) == first


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_padded_and_compiled_in_parts(served, rows, dynamic: bool) -> None:
    model, _ = served
    configuration = pytest.importorskip("transformers.generation.configuration_utils")
    made = configuration.CompileConfig(backend="eager", mode=None, dynamic=dynamic)
    sizes = {"page": 4, "blocks": 64, "batch": 24, "config": {"varlen_compile_config": made}}
    torch._dynamo.reset()
    assert _batched(model, rows, **sizes) == _alone(model, rows)
