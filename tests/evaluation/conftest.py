"""Fixtures of the tests of the metrics."""

from __future__ import annotations

import pytest

from coachhook.editing.requests import EditRequest
from tests.evaluation.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture
def requests():
    return [
        EditRequest(
            prompt="The capital of {} is",
            subject="France",
            target_new="Lyon in Italy",
            target_true="Paris",
            paraphrases=["Of France the seat is", "France, whose capital is"],
            neighborhood=["The capital of Spain is", "Italy borders", "Spain's capital is"],
        ),
        EditRequest(
            prompt="{} speaks", subject="Ann Art", target_new="Dutch", paraphrases=["Ann Art says"]
        ),
        EditRequest(
            prompt="{} lives in",
            subject="Cid",
            target_new="Madrid",
            target_true="New York City",
            neighborhood=["Bob lives in"],
            neighborhood_targets=["Paris and Spain"],
        ),
    ]
