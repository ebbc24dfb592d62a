"""Other wordings of a fact, in the model's own words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from coachhook.editing import editor as editing
from coachhook.editing.encoding import encode_requests
from coachhook.editing.prompts import EncodedPrompt, encode_in_context
from coachhook.editing.rewordings import (
    LEAST_PROBABILITY,
    LENGTH,
    Reader,
    _gumbel,
    find_rewordings,
    in_parts,
)
from coachhook.editing.targets import optimise_targets
from coachhook.models import describe, end_tokens
from tests.models.families import DISCOVERED, EXPERTS, SUPPORTED, tiny

# Logits of order 1 in float32, rounded otherwise beside other rows.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def found(bundled, requests):
    model, tokenizer, _ = bundled
    encoded = encode_requests(tokenizer, requests[:6], ("{}", "Some say that {}"), None)
    return encoded, rewordings(bundled, encoded)


def rewordings(bundled, encoded, **changes):
    model, tokenizer, _ = bundled
    options = {"most": 3, "ends": end_tokens(model, tokenizer), "pad_id": 0} | changes
    starts = [[request.essence, *request.contexts] for request in encoded]
    return find_rewordings(model, [r.contexts[0] for r in encoded], starts, **options)


@torch.no_grad()
def next_token(model, prompt):
    return model(torch.tensor([prompt.ids])).logits[0, -1].softmax(-1)


def test_the_model_answers_a_rewording_as_it_answers_the_prompt(bundled, found):
    encoded, reworded = found
    assert sum(map(len, reworded)) >= 6
    for request, others in zip(encoded, reworded, strict=True):
        answer = next_token(bundled[0], request.contexts[0]).argmax()
        prompt = request.contexts[0]
        tails = [tuple(other.ids[other.lookup + 1 :]) for other in others]
        assert len(set(tails)) == len(tails) <= 3
        for other, tail in zip(others, tails, strict=True):
            assert next_token(bundled[0], other)[answer] >= LEAST_PROBABILITY - 1e-4
            # About the same subject, which is where the prompt says; the answer is not given away.
            subject = other.ids[other.first : other.lookup + 1]
            assert subject[-1] == prompt.ids[prompt.lookup]
            assert 0 < len(tail) < LENGTH and int(answer) not in tail
            assert tail != tuple(prompt.ids[prompt.lookup + 1 :])


def test_rewordings_do_not_depend_on_the_batch(bundled, found):
    encoded, reworded = found
    for request, others in zip(encoded, reworded, strict=True):
        assert rewordings(bundled, [request]) == [others]
    fewer = rewordings(bundled, encoded, most=1)
    assert fewer == [others[:1] for others in reworded]


def test_a_start_given_twice_counts_twice(bundled, requests):
    """What is said there most often is taken first, though it is read once."""
    model, tokenizer, _ = bundled
    (request,) = encode_requests(tokenizer, requests[:1], ("{}", "Some say that {}"), None)
    prompt, other = request.contexts
    options = {"most": 9, "ends": end_tokens(model, tokenizer), "pad_id": 0}

    def of(*starts):
        return find_rewordings(model, [prompt], [list(starts)], **options)[0]

    once, rest = of(prompt), of(other)
    assert of(prompt, prompt) == once
    together = of(other, *[prompt] * 7)
    assert together[: len(once)] == once and len(together) <= len(once) + len(rest)


@torch.no_grad()
@pytest.mark.parametrize("family", SUPPORTED | DISCOVERED | EXPERTS)
def test_rows_of_any_length_are_read_on_as_the_whole_of_each(family):
    """Repeated, and some of them dropped on the way."""
    config_class = (SUPPORTED | DISCOVERED | EXPERTS)[family][0]
    if not hasattr(transformers, config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
    if family == "glm_moe_dsa":
        pytest.skip("its answers with a cache are others in transformers")
    model = tiny(family).eval()
    rows = [[3, 9, 20, 31, 8, 6, 17], [5, 11], [7, 30, 22, 4]]

    def whole(row):
        return model(torch.tensor([row])).logits[0, -1]

    reader = Reader(model, rows, pad_id=1)
    torch.testing.assert_close(reader.logits, torch.stack([whole(r) for r in rows]), **CLOSE)
    reader.repeat(2)
    rows = [row for row in rows for _ in range(2)]
    for places, tokens in (
        ([0, 1, 2, 4, 5], [9, 8, 7, 6, 5]),
        ([0, 1, 2, 3, 4], [4] * 5),
        ([1, 2], [12, 3]),
    ):
        rows = [rows[place] + [token] for place, token in zip(places, tokens, strict=True)]
        reader.read(places, tokens)
        torch.testing.assert_close(reader.logits, torch.stack([whole(r) for r in rows]), **CLOSE)


def test_none_where_there_is_no_room_or_no_answer(bundled, found):
    encoded, _ = found
    assert rewordings(bundled, encoded, max_positions=LENGTH) == [[]] * len(encoded)
    model = tiny("llama")  # knows nothing
    prompt = EncodedPrompt([1, 5, 9, 11], 1, 2)
    options = {"most": 3, "ends": [], "pad_id": 0}
    assert find_rewordings(model, [prompt], [[prompt]], **options) == [[]]


def test_targets_with_rewordings_in_a_batch_are_those_of_one_at_a_time(make_editor, requests):
    """Also beside a request with fewer of them, and one with none.

    Other facts' prompts stand in for rewordings, as they do not hold as soon as the contexts do.
    """
    editor, model, tokenizer = make_editor(target_steps=12, target_stop=1.0)
    batch = encode_requests(tokenizer, requests[:6], editor.config.contexts, None)
    others = [request.contexts[0] for request in batch[3:]]
    batch = [replace(r, rewordings=others[:n]) for r, n in zip(batch, (3, 1, 0), strict=False)]
    config = editor.config.with_(target_kl=0.1)
    together = optimise_targets(model, describe(model), batch, config, pad_id=0)
    for i, one in enumerate(batch):
        alone = optimise_targets(model, describe(model), [one], config, pad_id=0)
        difference = (together.values[:, i] - alone.values[:, 0]).norm()
        assert difference <= 1e-4 * alone.values.norm()
        assert together.steps[i] == alone.steps[0]
    bare = [replace(batch[0], rewordings=[])]
    without = optimise_targets(model, describe(model), bare, config, pad_id=0)
    assert (without.values[:, 0] - together.values[:, 0]).norm() > 1e-2 * without.values.norm()


def test_an_edit_asks_the_rewordings_only_where_it_should(make_editor, requests):
    with_them, _, _ = make_editor()
    assert with_them.config.rewordings == 3
    result = with_them.edit(requests[:2])
    none, _, _ = make_editor(rewordings=0)
    # The first has rewordings, the second none.
    first, second = zip(result.losses, none.edit(requests[:2]).losses, strict=True)
    assert first[0] != first[1] and second[0] == second[1]
    paper, _, _ = make_editor("paper")
    assert paper.config.rewordings == 0


def test_a_context_loses_its_first_words_where_there_is_no_room(bundled, requests):
    tokenizer, request = bundled[1], requests[0]
    context = "One two three four. {}"
    whole = encode_in_context(tokenizer, request, context)
    bare = encode_in_context(tokenizer, request, "{}")
    for room in range(len(bare.ids), len(whole.ids) + 1):
        cut = encode_in_context(tokenizer, request, context, room)
        assert len(bare.ids) <= len(cut.ids) <= room
        text = tokenizer.decode(cut.ids, skip_special_tokens=True).strip()
        assert text.endswith(request.text) and context.format(request.text).endswith(text)
        subject = tokenizer.decode(cut.ids[cut.first : cut.lookup + 1])
        assert subject.strip() == request.subject
    assert encode_in_context(tokenizer, request, context, len(whole.ids)) == whole
    with pytest.raises(ValueError, match="context window"):
        encode_in_context(tokenizer, request, context, len(bare.ids) - 1)


def test_fewer_at_once_where_the_memory_does_not_hold_them():
    asked = []

    def run(some):
        asked.append(len(some))
        if len(some) > room:
            raise torch.cuda.OutOfMemoryError("no room")
        return [item * 10 for item in some]

    room = 3
    assert in_parts(run, range(20), 8) == [item * 10 for item in range(20)]
    assert asked == [8, 4, *[2] * 10]
    room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        in_parts(run, range(4), 8)
    assert in_parts(run, [], 8) == []


def test_a_rewording_has_room_for_the_target(make_editor, requests, monkeypatch):
    editor, model, _ = make_editor()
    request = replace(requests[0], target_new="Marie Antoinette Fontaine")
    (encoded,) = editor._encoded([request])
    prompt, room = encoded.contexts[0], describe(model).max_positions - len(encoded.target) + 1
    fits, long = (
        EncodedPrompt(prompt.ids + [prompt.ids[-1]] * more, prompt.first, prompt.lookup)
        for more in (room - len(prompt.ids), room - len(prompt.ids) + 1)
    )
    monkeypatch.setattr(editing, "find_rewordings", lambda *_, **__: [[long, fits]])
    assert editor._reworded([encoded], 0)[0].rewordings == [fits]
    editor.edit([request])


def test_noise_is_the_same_whatever_the_defaults_are():
    wanted = _gumbel(7)
    with torch.device("meta"):
        assert torch.equal(_gumbel(7), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(_gumbel(7), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
