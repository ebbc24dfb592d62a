"""Where a fact is written: names of tokens, and targets of several tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coachhook import EditConfig
from coachhook.editing.encoding import encode_requests
from coachhook.editing.prompts import EncodedPrompt, expand_places
from coachhook.editing.targets import optimise_targets
from coachhook.models import describe

NAMES = "Grand Duke Otto of Vienna"


@torch.no_grad()
def says(model, tokenizer, prompt, tokens):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :]).strip()


def test_places_of_a_prompt_and_its_target():
    prompt, target = EncodedPrompt([9, 1, 2, 3, 7], 1, 3), [20, 21, 22]
    short = EncodedPrompt([1, 2], 1, 1)
    wanted = {
        ("subject_last", 0): (3, [9, 1, 2, 3, 7]),
        ("target", 0): (5, [9, 1, 2, 3, 7, 20]),
        ("target", 1): (6, [9, 1, 2, 3, 7, 20, 21]),
        ("subject_previous", 0): (2, [9, 1, 2, 3, 7]),
        ("prompt_last", 0): (4, [9, 1, 2, 3, 7]),
    }
    for place, (position, ids) in wanted.items():
        assert prompt.position(place, target) == position
        assert prompt.at(place, target) == EncodedPrompt(ids, 1, position)
    for place in (("target", 2), ("target", 0)):
        assert prompt.position(place, target[: place[1] + 1]) is None
    for place in (("subject_previous", 0), ("prompt_last", 0)):
        assert short.position(place, target) is None
        with pytest.raises(ValueError, match="place must be in the prompt or its target"):
            short.at(place, target)


@pytest.mark.parametrize("order", [("subject_last", "prompt_last", "target"), None])
def test_tokens_of_the_target_come_with_the_first_place(order):
    names = order or ("subject_last", "target", "prompt_last")
    expanded = [("subject_last", 0), ("target", 0), ("target", 1), ("prompt_last", 0)]
    assert expand_places(names, [[5], [5, 6, 7], [5, 6]]) == expanded
    assert expand_places(names, [[5]]) == [expanded[0], expanded[-1]]
    assert expand_places(["subject_last"], [[5, 6, 7]]) == expanded[:1]


def test_a_name_of_many_tokens_is_said_word_for_word(make_editor, requests):
    wanted = [replace(r, target_new=NAMES) for r in requests[:1]]
    without, model, tokenizer = make_editor(places=("subject_last",))
    length = len(tokenizer(" " + NAMES, add_special_tokens=False)["input_ids"])
    assert length >= 5
    assert without.edit(wanted).converged == [False]

    editor, model, tokenizer = make_editor()
    before = says(model, tokenizer, requests[1].text, 3)
    result = editor.edit([*wanted, requests[2]])
    assert result.converged == [True, True]
    # That the name ends is said at its last token; nobody else needs that place.
    said = [(r, editor.config.places[p]) for r, p in editor.batches[result.batch].slots]
    assert [r for r, place in said if place == "target_last"] == [0]
    places = [editor.config.places[p] for r, p in editor.batches[1].slots if r == 0]
    assert places.count("target") >= length // 2
    assert says(model, tokenizer, wanted[0].text, length) == NAMES
    assert says(model, tokenizer, requests[1].text, 3) == before
    # The tokens of the target, where nothing of the fact stands before them.
    assert says(model, tokenizer, NAMES.split()[0], 1) != NAMES.split()[1]

    again = requests[3].target_new
    editor.edit([replace(wanted[0], target_new=again)])
    assert says(model, tokenizer, wanted[0].text, 1) == again
    editor.revert(2)
    assert says(model, tokenizer, wanted[0].text, length) == NAMES
    editor.revert(1)
    with editor.hooks.disabled():
        plain = says(model, tokenizer, wanted[0].text, length)
    assert says(model, tokenizer, wanted[0].text, length) == plain


def test_several_tokens_in_a_batch_are_as_alone(make_editor, requests):
    """Beside a target of one token and one of other length."""
    editor, model, tokenizer = make_editor(target_steps=8)
    batch = encode_requests(
        tokenizer,
        [
            replace(requests[0], target_new=NAMES),
            requests[1],
            replace(requests[2], target_new="Otto of Rome"),
        ],
        editor.config.contexts,
        None,
    )
    config = editor.config
    together = optimise_targets(model, describe(model), batch, config, pad_id=0)
    for i, one in enumerate(batch):
        alone = optimise_targets(model, describe(model), [one], config, pad_id=0)
        columns = [together.places.index(place) for place in alone.places]
        assert torch.equal(together.used[i, columns], alone.used[0])
        assert int(together.used[i].sum()) == int(alone.used.sum())
        difference = (together.deltas[i, columns] - alone.deltas[0]).norm()
        assert difference <= 1e-4 * alone.deltas.norm()


def test_a_place_that_is_not_admitted_is_left_alone(make_editor, requests):
    editor, model, tokenizer = make_editor(target_steps=6)
    request = replace(requests[0], target_new=NAMES)
    batch = encode_requests(tokenizer, [request], editor.config.contexts, None)
    asked = []

    def admit(pairs):
        asked.extend(pairs)
        return [place == ("target", 1) for _, place in pairs]

    found = optimise_targets(model, describe(model), batch, editor.config, pad_id=0, admit=admit)
    used = [p for p, yes in zip(found.places, found.used[0].tolist(), strict=True) if yes]
    assert used == [("subject_last", 0), ("target", 1)]
    assert (found.deltas[0][~found.used[0]] == 0).all()
    tokens = [(0, ("target", i)) for i in range(len(batch[0].target) - 1)]
    assert asked[: len(tokens)] == tokens
    # Nothing is asked after the target, so its last token needs no place.
    assert {place[0] for _, place in asked} == {*editor.config.places[1:]} - {"target_last"}


def test_another_subject_whose_key_fires_gets_an_edit_of_its_own(make_editor, requests):
    """Its facts must not take the place of the first subject's."""
    first = requests[0]
    other = replace(
        first, prompt=first.text.replace(first.subject, f"Old {first.subject}"),
        subject=f"Old {first.subject}", target_new=requests[1].target_new,
    )  # fmt: skip
    editor, model, tokenizer = make_editor(places=("subject_last",))
    editor.edit([first])
    editor.edit([other])
    layer = editor.config.layers[0]
    assert editor._state.group_ids(layer).tolist() == [0, 1]
    assert says(model, tokenizer, first.text, 1) == first.target_new
    editor.edit([replace(first, target_new=requests[2].target_new)])
    assert editor._state.group_ids(layer).tolist() == [0, 1]
    assert says(model, tokenizer, first.text, 1) == requests[2].target_new


def test_folders_written_with_a_setting_that_is_gone_are_read(bundled):
    record = EditConfig.for_model(bundled[0]).to_dict()
    gone = {"target_parts": 2, "alpha_prompt": 0.9}
    assert EditConfig.from_dict({**record, **gone}) == EditConfig.from_dict(record)


def test_folders_written_before_a_setting_keep_their_steps(bundled):
    record = EditConfig.paper(bundled[0]).to_dict()
    later = ("target_betas", "target_scaling", "target_progress", "target_ends_word")
    earlier = {name: value for name, value in record.items() if name not in later}
    assert EditConfig.from_dict(earlier) == EditConfig.from_dict(record)
