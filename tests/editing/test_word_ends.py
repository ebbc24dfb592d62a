"""A target's last word ends with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coachhook.editing.encoding import encode_requests
from coachhook.editing.problem import find_losses, make_problem
from coachhook.editing.prompts import expand_places
from coachhook.editing.suffix import Suffix
from coachhook.editing.word_ends import ends_word, word_continuing_tokens
from coachhook.evaluation.observations import begins_with
from coachhook.models import describe

# Pieces of names that the bundled model goes on with, for its first three facts.
PIECES = ["Qu", "Sor", "Ver"]


@pytest.mark.parametrize("text", ["Lyon", "Malmö", "ΑΘΗΝΑ", "Москва", "1809", "x"])
def test_a_letter_goes_on_with_a_word(text):
    assert ends_word(text)


@pytest.mark.parametrize("text", ["", "Lyon.", "U.S.", "東京", "กรุงเทพ", "ירושלים", "(1809)", "a "])
def test_no_word_is_gone_on_with(text):
    assert not ends_word(text)


def test_tokens_are_told_apart(bundled):
    model, tokenizer, _ = bundled
    size = model.config.vocab_size
    continues = word_continuing_tokens(tokenizer, size + 3)
    assert continues.shape == (size + 3,) and not continues[size:].any()
    for text, expected in [("our", True), ("1", True), (" our", False), (".", False), ("'", False)]:
        first = tokenizer(text, add_special_tokens=False)["input_ids"][0]
        assert bool(continues[first]) is expected, text
    assert not continues[tokenizer.eos_token_id]


@pytest.mark.parametrize("model_name", ["factlm-gpt2", "factlm-llama"])
def test_tokens_are_told_apart_by_other_tokenizers(shared_dir, model_name):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_dir / "models" / model_name)
    continues = word_continuing_tokens(tokenizer, len(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # Of ASCII tokens the byte-level alphabet shows what they start with.
    plain = [i for i, token in enumerate(tokens) if token[0].isascii()]
    assert len(plain) > 1000
    assert [bool(continues[i]) for i in plain] == [tokens[i][0].isalnum() for i in plain]
    assert not continues[[i for i, token in enumerate(tokens) if token[0] == "Ġ"]].any()


def test_loss_has_what_comes_after_the_target(make_editor, requests):
    """Against the whole model on plain text."""
    editor, model, tokenizer = make_editor(
        dtype=torch.float64, rewordings=0, places=("subject_last",)
    )
    editor.detach()
    config = editor.config.with_(target_weight_decay=0.0)
    description = describe(model)
    encoded = encode_requests(tokenizer, requests[:3], config.contexts, None)
    encoded[1] = replace(encoded[1], ends_word=False)
    continuing = word_continuing_tokens(tokenizer, model.config.vocab_size)
    suffix = Suffix(model, description, config.layers[-1])
    places = expand_places(config.places, [request.target for request in encoded])
    device = torch.device("cpu")
    problem = make_problem(suffix, encoded, places, [{}] * 3, config, 0, device, continuing)
    everything = torch.arange(3)
    rows = problem.select(suffix, everything, torch.ones(3, dtype=torch.bool))
    delta = torch.zeros(3, 1, model.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        losses = find_losses(suffix, rows, delta, torch.ones(3), None, config).total
    for request, got in zip(encoded, losses.tolist(), strict=True):
        terms = []
        for number, prompt in enumerate(request.contexts):
            with torch.no_grad():
                logits = model(torch.tensor([prompt.ids + request.target])).logits[0]
            at = len(prompt.ids) - 1
            said = [logits[at + i].log_softmax(-1)[t] for i, t in enumerate(request.target)]
            if number == 0 and request.ends_word:
                said.append(logits[-1].softmax(-1)[~continuing].sum().log())
            terms.append(-sum(said) / len(request.target))
        assert got == pytest.approx(float(sum(terms) / len(terms)), rel=1e-9)


def test_a_word_is_not_gone_on_with(make_editor, requests):
    facts = [replace(r, target_new=piece) for r, piece in zip(requests[:3], PIECES, strict=True)]

    def answers(**overrides):
        editor, model, tokenizer = make_editor(**overrides)
        assert editor.edit(facts).converged == [True] * 3
        found = []
        for fact in facts:
            ids = tokenizer(fact.text, return_tensors="pt")["input_ids"]
            said = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
            found.append(tokenizer.decode(said))
        return found

    runs_on = answers(target_ends_word=False)
    assert all(t.lstrip().startswith(p) for t, p in zip(runs_on, PIECES, strict=True))
    assert sum(begins_with(t, p) for t, p in zip(runs_on, PIECES, strict=True)) <= 1
    ends = answers()
    assert all(begins_with(t, p) for t, p in zip(ends, PIECES, strict=True)), ends


def test_a_prompt_that_fills_the_window_is_not_asked(bundled, requests):
    """The token after the target would have no room."""
    _, tokenizer, _ = bundled
    request = requests[0]
    ids = tokenizer(request.text)["input_ids"]
    target = tokenizer(" " + request.target_new, add_special_tokens=False)["input_ids"]
    exact = len(ids) + len(target)
    for window, expected in [(exact, True), (exact - 1, False), (None, True)]:
        (one,) = encode_requests(tokenizer, [request], ("{}",), window)
        assert one.ends_word is expected
