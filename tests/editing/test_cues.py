"""Cues: an edit fires only where the rest of its subject, or its subject, has been read."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch

from coachhook import EditConfig, Editor, EditRequest, attach
from coachhook.editing import EditMemory
from coachhook.editing.cue_tokens import cue_distances, cue_reach, of_other_words
from coachhook.editing.cues import cue_limit, find_cues, read_cues
from coachhook.editing.encoding import encode_requests
from coachhook.editing.prompts import PLACES, EncodedPrompt
from coachhook.editing.records import BatchRecord
from coachhook.editing.state import EditState, LayerEdits


def answer(model, tokenizer, prompt, tokens=2, **kwargs):
    encoded = tokenizer(prompt, return_tensors="pt", padding=isinstance(prompt, list))
    out = model.generate(**encoded, max_new_tokens=tokens, do_sample=False, **kwargs)
    said = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :])
    return said if isinstance(prompt, list) else said[0].strip()


@torch.no_grad()
def logits(model, tokenizer, text):
    return model(**tokenizer(text, return_tensors="pt")).logits


def test_where_a_cue_may_be():
    long, short = EncodedPrompt([9, 1, 2, 3, 4, 7], 1, 4), EncodedPrompt([1, 2, 3, 7], 0, 2)
    assert cue_distances([long], ("subject_last", 0)) == [1, 2, 3]
    assert cue_distances([long, short], ("subject_last", 0)) == [1, 2]
    assert cue_distances([long], ("subject_previous", 0)) == [2, 3]
    for place in (("prompt_last", 0), ("target", 2)):
        assert cue_distances([long, short], place) == [0, 1, 2]
    single = EncodedPrompt([9, 1, 7], 1, 1)
    assert cue_distances([long, single], ("subject_last", 0)) == []
    assert cue_distances([long, single], ("prompt_last", 0)) == [0]
    assert cue_distances([EncodedPrompt([1, 2, 7], 0, 1)], ("subject_previous", 0)) == []
    assert len(cue_distances([EncodedPrompt(list(range(40)), 0, 30)], ("subject_last", 0))) == 6


def test_how_far_an_edit_reaches():
    prompts = [EncodedPrompt([9, 1, 2, 3, 4, 7], 1, 4), EncodedPrompt([1, 2, 3, 4, 7], 0, 3)]
    for name in ("subject_last", "subject_previous"):
        assert cue_reach(prompts, (name, 0), [5, 6]) == 8
        assert cue_reach(prompts, (name, 0), [5, 6], 2) == 40
        # Wherever the cue may be.
        farthest = max(cue_distances([EncodedPrompt(list(range(40)), 0, 30)], (name, 0)))
        assert farthest <= cue_reach(prompts, (name, 0), [5, 6])
    for name in ("prompt_last", "target", "target_last"):
        for tokens in (1, 2):
            assert cue_reach(prompts, (name, 0), [5, 6], tokens) == 40
    # A prompt that goes on for long after its subject is reached in any of its contexts.
    far = [*prompts, EncodedPrompt(list(range(60)), 2, 9)]
    reach = {"prompt_last": 50 + 6, "target": 51 + 6, "target_last": 52 + 6}
    for name, wanted in reach.items():
        assert cue_reach(far, (name, 0), [5, 6]) == wanted
        away = cue_distances(far, (name, 0))[-1]
        at = far[2].position((name, 0), [5, 6])
        assert at - (far[2].lookup - away) <= wanted


def some_memory(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, 3 * n, dtype=torch.float64, generator=generator)
    prior = root @ root.T / n
    return EditMemory(prior, 2), prior, generator


def test_a_cue_answers_its_keys_with_one_and_the_prior_least():
    memory, prior, generator = some_memory(12)
    keys = torch.randn(3, 12, dtype=torch.float64, generator=generator)
    found = find_cues(memory, [[keys]], None)[0][0]
    assert keys @ found == pytest.approx([1, 1, 1], abs=1e-5)
    least = found @ prior @ found
    for _ in range(20):
        # Any other filter that answers the keys alike answers text more.
        step = torch.randn(12, dtype=torch.float64, generator=generator)
        step -= keys.T @ torch.linalg.solve(keys @ keys.T, keys @ step)
        other = found + 0.1 * step
        assert keys @ other == pytest.approx([1, 1, 1], abs=1e-5)
        assert other @ prior @ other > least * (1 - 1e-6)


def test_a_cue_does_not_depend_on_other_edits():
    memory, _, generator = some_memory(12)
    keys = torch.randn(2, 12, dtype=torch.float64, generator=generator)
    alone = find_cues(memory, [[keys]], None)[0][0]
    memory.append(torch.randn(12, 5, dtype=torch.float64, generator=generator), torch.ones(2, 5))
    assert torch.equal(find_cues(memory, [[keys]], None)[0][0], alone)


def test_two_tokens_are_matched_at_once():
    memory, prior, generator = some_memory(12)
    one, two = torch.randn(2, 2, 12, dtype=torch.float64, generator=generator)
    filters, tokens = find_cues(memory, [[one, two]], None)
    assert tokens == [(0, 1)]
    both = torch.cat([one, two])
    assert both @ filters[0] == pytest.approx([1, 1, 1, 1], abs=1e-5)
    least = torch.linalg.solve(prior, both.T)
    wanted = least @ torch.linalg.solve(both @ least, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(filters[0], wanted, rtol=1e-4, atol=1e-6)


def chosen(memory, slot, sample=None, place="subject_last", others=None):
    wanted = None if others is None else [others]
    return find_cues(memory, [slot], sample, "down_proj", [place], wanted)[1][0]


def test_the_tokens_that_other_text_shows_least_are_the_cue():
    memory, _, generator = some_memory(12)
    slot = list(torch.randn(3, 2, 12, dtype=torch.float64, generator=generator))
    nothing = torch.zeros(3000, 12)
    for sample in (None, nothing[:0], nothing):
        assert chosen(memory, slot, sample) == (0, 1)
    seen = nothing.clone()
    seen[0] = slot[0][0].float()
    assert chosen(memory, slot, seen) == (1, 2)
    seen[1:3] = slot[1].float()
    assert chosen(memory, slot, seen) == (2, 0)
    assert chosen(memory, slot[:1], seen) == (0,)


def test_one_token_of_the_cue_is_of_another_word_where_there_is_one():
    memory, _, generator = some_memory(12)
    slot = list(torch.randn(4, 2, 12, dtype=torch.float64, generator=generator))
    others = [False, False, True, True]
    assert chosen(memory, slot, None, others=others) == (2, 3)
    assert chosen(memory, slot[:3], None, others=others[:3]) == (2, 0)
    rarely, often = (torch.zeros(3000, 12) for _ in range(2))
    rarely[:2], often[:4] = slot[2].float(), slot[2].repeat(2, 1).float()
    assert chosen(memory, slot, rarely, others=others) == (3, 2)  # no more than a thousandth
    assert chosen(memory, slot, often, others=others) == (3, 0)
    # Behind the subject its last token comes first.
    behind = [False, False, True, False]
    assert chosen(memory, slot, None, "prompt_last", behind) == (0, 2)
    assert chosen(memory, slot, often, "target", behind) == (0, 1)


def test_which_tokens_are_of_other_words():
    texts = {1: "The", 2: " Ko", 3: "ichi", 4: " K", 5: "ob", 6: "ayashi", 7: "'s"}
    prompt = EncodedPrompt([1, 2, 3, 4, 5, 6, 7], 1, 5)

    def decode(ids):
        return "".join(texts[i] for i in ids)

    for place, distances, wanted in (
        ("subject_last", [1, 2, 3, 4], [False, False, True, True]),
        ("subject_previous", [2, 3, 4], [False, True, True]),
        ("prompt_last", [0, 1, 2, 3, 4], [False, False, False, True, True]),
        ("target", [0, 2, 4], [False, False, True]),
    ):
        assert of_other_words(distances, prompt, (place, 0), decode) == wanted


def test_behind_the_subject_its_last_token_is_one_of_the_cue_unless_it_is_common():
    memory, _, generator = some_memory(12)
    slot = list(torch.randn(3, 2, 12, dtype=torch.float64, generator=generator))
    last, earlier = slot[:2]
    rare = torch.zeros(3000, 12)
    rare[:2] = last.float()  # no more than a thousandth
    common = rare.clone()
    common[2:4] = last.float()
    both = common.clone()
    both[4:8] = earlier[0].float()
    for name in ("prompt_last", "target"):
        for sample, wanted in ((None, (0, 1)), (rare, (0, 1)), (common, (1, 2)), (both, (2, 0))):
            assert chosen(memory, slot, sample, name) == wanted
        assert chosen(memory, slot[:1], common, name) == (0,)  # there is no other
    # At the subject the rarer ones always are.
    assert chosen(memory, slot, rare, "subject_last") == (1, 2)


def test_a_token_without_a_key_is_no_cue():
    memory, _, generator = some_memory(12)
    keys, nothing = torch.randn(2, 12, dtype=torch.float64, generator=generator), torch.zeros(2, 12)
    alone = find_cues(memory, [[keys]], None)[0][0]
    for sample in (None, keys.float()):
        slots = [[nothing.double(), keys], [nothing.double()]]
        found, tokens = find_cues(memory, slots, sample)
        torch.testing.assert_close(found[0], alone, rtol=1e-12, atol=0)
        assert not found[1].any() and tokens == [(1,), ()]


def test_cues_together_are_those_of_one_at_a_time(monkeypatch):
    memory, _, generator = some_memory(12)
    counts = [[3, 5], [], [2], [4, 1, 6], [2, 2]]
    slots = [
        [torch.randn(v, 12, dtype=torch.float64, generator=generator) for v in some]
        for some in counts
    ]
    sample = torch.randn(50, 12, generator=generator).bfloat16()
    together, tokens = find_cues(memory, slots, sample)
    assert not together[1].any() and tokens[1] == ()
    for slot, found, numbers in zip(slots, together, tokens, strict=True):
        if slot:
            own = find_cues(memory, [slot], sample)
            torch.testing.assert_close(found, own[0][0], rtol=1e-12, atol=0)
            assert own[1] == [numbers] and len(numbers) == min(len(slot), 2)
            answers = torch.cat([slot[number] for number in numbers]) @ found
            torch.testing.assert_close(answers, torch.ones_like(answers), rtol=0, atol=1e-3)
    assert len(set(tokens)) > 3
    monkeypatch.setattr("coachhook.editing.cues._KEYS_AT_ONCE", 5)
    monkeypatch.setattr("coachhook.editing.cues._SAMPLES_AT_ONCE", 7)
    again = find_cues(memory, slots, sample)
    torch.testing.assert_close(again[0], together, rtol=1e-12, atol=0)
    assert again[1] == tokens
    assert find_cues(memory, [[], []], sample)[0].shape == (2, 12)


def test_settings_that_have_cues(bundled):
    config = EditConfig.for_model(bundled[0])
    assert config.uses_cues
    assert not config.with_(cues=False).uses_cues
    assert not config.with_(correction="sum").uses_cues
    assert not config.with_(scope="population").uses_cues
    assert not EditConfig.paper(bundled[0]).uses_cues


N = 8


@pytest.fixture
def state():
    memory = EditMemory(0.1 * torch.eye(N, dtype=torch.float64), 2)
    return EditState(EditConfig(layers=[0], contexts=["{}"]), {0: LayerEdits(memory)})


def axis(i):
    return torch.eye(N, dtype=torch.float64)[i]


def write(state, key, cue=None, place="subject_last", subject="A B", inputs=None, change=1.0):
    request = EditRequest(f"{subject} is", subject, "new")
    slots = [(0, PLACES.index(place))]
    record = BatchRecord([request], torch.zeros(2, 1), [True], [0.0], slots, {}, {}, [[(1,)]])
    record.cues[0] = (torch.zeros(N) if cue is None else cue.float())[None]
    wanted = torch.tensor([[change, -change]], dtype=torch.float64)
    return state.append(0, key[None], wanted, record, inputs)


def test_edits_with_and_without_cues_in_a_payload(state):
    assert state.cues(0) is None
    write(state, axis(0), subject="A")
    assert state.cues(0) is None and "cues" not in state.payload(0).tensors
    write(state, axis(1), axis(2))
    write(state, axis(3), axis(4), place="prompt_last")
    cues = state.cues(0)
    filters, limits = cues["cues"], cues["limits"]
    assert filters.tolist() == torch.stack([0 * axis(0), axis(2), axis(4)]).float().tolist()
    site = "down_proj"
    wanted = [-torch.inf, cue_limit("subject_last", site), cue_limit("prompt_last", site)]
    assert limits.tolist() == pytest.approx(wanted)
    for site in ("down_proj", "mlp"):
        assert 0 < cue_limit("subject_last", site) < cue_limit("prompt_last", site) < 1
        for place in ("subject_last", "prompt_last"):
            assert 0 < cue_limit(place, site, 2) < cue_limit(place, site)
    tensors = state.payload(0).tensors
    assert all(torch.equal(tensors[name], cue) for name, cue in cues.items())
    # Of edits of before there were reaches: for ever.
    assert cues["reaches"].tolist() == [2**31 - 1] * 3
    state.batches[2].reaches, state.batches[3].reaches = [8], [10**12]
    assert state.payload(0).tensors["reaches"].tolist() == [2**31 - 1, 8, 2**31 - 1]
    assert state.payload(0).tensors["reaches"].dtype == torch.int32
    # And of those of before there were gaps: one token is the cue.
    assert cues["gaps"].tolist() == [0, 0, 0]
    state.batches[2].gaps, state.batches[3].gaps = {0: [3], 1: [1]}, {0: [10**12]}
    assert state.payload(0).tensors["gaps"].tolist() == [0, 3, 7]
    assert state.payload(0).tensors["gaps"].dtype == torch.int32
    # An edit's batch that wrote it last tells; one without a cue has no gap.
    write(state, axis(1), axis(2))
    assert state.cues(0)["gaps"].tolist() == [0, 0, 7]
    state.batches[1].gaps = {0: [2]}
    assert state.cues(0)["gaps"].tolist() == [0, 0, 7]
    state.remove(4)
    state.remove(2)
    assert state.cues(0)["cues"].shape == (2, N)


def test_thresholds_of_edits_with_cues(state):
    """They do not follow the sample; the key's own row gives alpha over the threshold."""
    state.layers[0].sample = torch.stack([axis(0), axis(1)])
    for i, place in enumerate(("subject_last", "subject_previous", "prompt_last", "target")):
        write(state, axis(i), axis(7), place, subject=f"A {i}")
    config, rows = state.config, state.pair(0)[1]
    own = [float(rows[i] @ axis(i)) for i in range(4)]
    assert own[:2] == pytest.approx([config.alpha / config.alpha_cued] * 2, rel=1e-6)
    assert own[2:] == pytest.approx([config.alpha / config.alpha_answer] * 2, rel=1e-6)
    assert all(not batch.anchors[0] for batch in state.batches.values())


@pytest.mark.parametrize("read", [True, False])
def test_a_new_edit_counts_on_an_earlier_one_only_where_its_cue_was_read(state, read):
    write(state, axis(0), axis(5))
    sequence = torch.stack([axis(5) if read else axis(6), axis(0)])[None]
    write(
        state, axis(0), axis(5), place="prompt_last", subject="other",
        inputs=lambda rows: sequence[rows],
    )  # fmt: skip
    # The first target is (1, -1); the second is on top of what the hook says there.
    wanted = [2.0, -2.0] if read else [1.0, -1.0]
    targets = state.layers[0].memory.state_dict()[0]["targets"]
    assert targets[1].tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("gap", "counts"), [(0, True), (1, False), (2, True)])
def test_a_new_edit_counts_on_an_earlier_one_only_where_both_tokens_were_read(state, gap, counts):
    write(state, axis(0), axis(5))
    record = state.batches[1]
    record.reaches, record.gaps = [8], {0: [gap]}
    sequence = torch.stack([axis(i) for i in (5, 6, 5, 0)])[None]
    write(
        state, axis(0), axis(5), place="prompt_last", subject="other",
        inputs=lambda rows: sequence[rows],
    )  # fmt: skip
    wanted = [2.0, -2.0] if counts else [1.0, -1.0]
    targets = state.layers[0].memory.state_dict()[0]["targets"]
    assert targets[1].tolist() == pytest.approx(wanted, rel=1e-6)


def test_records_keep_their_cues(state):
    write(state, axis(0), axis(5))
    record = state.batches[1]
    assert record.cued(0) == [True]
    again = BatchRecord.from_dict(record.to_dict(), record.targets, record.cues)
    assert again.cued(0) == [True]
    assert BatchRecord.from_dict(record.to_dict(), record.targets).cued(0) == [False]
    assert again.gaps == {}
    record.gaps = {0: [4], 2: [0]}
    told = json.loads(json.dumps(record.to_dict()))
    assert BatchRecord.from_dict(told, record.targets, record.cues) == record
    del told["gaps"]  # as of before there were such
    assert BatchRecord.from_dict(told, record.targets).gaps == {}


@pytest.fixture(scope="module")
def written(bundled, requests):
    """The demo's facts in three batches."""
    model, tokenizer, statistics = bundled
    model = copy.deepcopy(model)
    editor = Editor(model, tokenizer, statistics=statistics)
    for start in range(0, 15, 5):
        editor.edit(requests[start : start + 5])
    yield editor, model, tokenizer
    editor.detach()


def test_every_edit_of_a_longer_subject_has_a_cue(written, requests):
    editor, _, tokenizer = written
    layer = editor.config.layers[0]
    for batch in editor.batches.values():
        for (r, p), cued in zip(batch.slots, batch.cued(layer), strict=True):
            ids = tokenizer(" " + batch.requests[r].subject, add_special_tokens=False)["input_ids"]
            at_subject = PLACES[p].startswith("subject")
            assert cued or (at_subject and len(ids) == 1), (batch.requests[r].subject, PLACES[p])


def test_the_end_of_a_prompt_waits_for_its_subject(make_editor, requests):
    """Written at the prompt's last token a fact is not told of others in the same words."""
    editor, model, tokenizer = make_editor(
        places=("subject_last", "prompt_last"),
        target_steps=2,  # so that it does not come out at the subject
    )
    request = requests[0]
    editor.edit([request])
    layer = editor.config.layers[0]
    assert "prompt_last" in {editor.config.places[p] for _, p in editor.batches[1].slots}
    hook = editor.hooks[layer]
    other = request.text.replace(request.subject, "Drestan")

    def fires_last(text):
        with editor.hooks.record() as found:
            logits(model, tokenizer, text)
        return bool(found[0][2][0, -1])

    assert fires_last(request.text) and not fires_last(other)
    # The words alone give nearly the same key.
    v, at = (x.clone() for x in hook.operand())
    hook.set_pair(v, at, correction="own")
    assert fires_last(other)


def test_edits_answer_alike_with_and_without_a_cache_and_padded(written, requests):
    editor, model, tokenizer = written
    prompts = [r.text for r in requests[:6]]
    alone = [answer(model, tokenizer, p, use_cache=False) for p in prompts]
    assert [answer(model, tokenizer, p) for p in prompts] == alone
    right = [a.startswith(r.target_new) for a, r in zip(alone, requests, strict=False)]
    assert sum(right) >= 5
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        assert [a.strip() for a in answer(model, tokenizer, prompts)] == alone
    finally:
        tokenizer.padding_side = side


def test_a_folder_keeps_cues(written, bundled, requests, tmp_path):
    editor, model, tokenizer = written
    editor.save(tmp_path / "edits")
    prompts = [r.text for r in requests[:4]]
    wanted = [logits(model, tokenizer, p) for p in prompts]
    fresh = copy.deepcopy(bundled[0])
    with attach(fresh, tmp_path / "edits") as handle:
        hook = next(iter(handle.hooks.values()))
        assert hook.cues()
        assert all(
            torch.equal(logits(fresh, tokenizer, p), w)
            for p, w in zip(prompts, wanted, strict=True)
        )
    again = Editor.load(fresh, tokenizer, tmp_path / "edits")
    try:
        layer = again.config.layers[0]
        new, old = (e._state.cues(layer) for e in (again, editor))
        assert new.keys() == old.keys() and all(torch.equal(new[k], old[k]) for k in new)
        assert {8, 40} <= set(old["reaches"].tolist())
        again.revert(2)
        assert len(again._state.cues(layer)["limits"]) < len(old["limits"])
        assert not answer(fresh, tokenizer, requests[5].text).startswith(requests[5].target_new)
        assert answer(fresh, tokenizer, requests[1].text).startswith(requests[1].target_new)
    finally:
        again.detach()


def test_without_cues_nothing_is_written_at_the_end_of_a_prompt(make_editor, requests):
    editor, _, _ = make_editor(cues=False, target_steps=2, false_fire=1.0)
    editor.edit(requests[:3])
    layer = editor.config.layers[0]
    assert not editor.hooks[layer].cues() and not any(editor.batches[1].cued(layer))
    places = {PLACES[p] for _, p in editor.batches[1].slots}
    assert "subject_previous" in places and "prompt_last" not in places


def test_a_common_token_is_known_after_any_word(make_editor, requests):
    """Keys of the cue's token in the unrelated sample count as keys of the cue."""
    editor, _, tokenizer = make_editor()
    state, layer = editor._state, editor.config.layers[0]
    request = requests[1]  # "Mira Brenmore"
    encoded = encode_requests(tokenizer, [request], editor.config.contexts, None)
    slots = [(encoded[0], ("subject_last", 0))]
    prompt = encoded[0].contexts[0]
    token = prompt.ids[prompt.lookup - 1]
    rows = sorted(state.sample_tokens.rows([(token,)]))[:32]
    assert rows
    elsewhere = state.layers[layer].sample[rows].float()
    edits = state.layers[layer]
    read = partial(
        read_cues,
        slots,
        edits.memory,
        partial(editor._inputs, layer=layer, pad_id=0),
        sample=edits.sample,
        decode=tokenizer.decode,
        key_site="down_proj",
    )
    with_sample, without = (
        elsewhere @ read(known=known).filters[0].float() for known in (state.sample_tokens, None)
    )
    assert with_sample == pytest.approx([1] * len(rows), abs=0.05)
    assert (without < 0.9).any()
