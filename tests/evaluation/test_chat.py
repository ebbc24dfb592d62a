"""Facts asked in a chat: prompts as a user's messages, through the tokenizer's chat template."""

from __future__ import annotations

import copy
import json
import sys

import pytest

from coachhook import Editor, EditRequest, bundled, collect_statistics
from coachhook.cli import main
from coachhook.errors import FactsError
from coachhook.evaluation import evaluate
from coachhook.evaluation.observations import contains
from coachhook.evaluation.scoring import encode_chat, greedy
from coachhook.models import load_model

# The start token is the template's, as in most models, and thinking can be left out.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'The book is old. ' + m['content'] }}{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}{{ ' Well,' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat():
    """The bundled model with edits, and its tokenizer with a chat template."""
    model, tokenizer = load_model(bundled.model_path())
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    facts = [EditRequest.from_dict(fact) for fact in bundled.facts()[:3]]
    statistics = collect_statistics(
        model, tokenizer, bundled.texts(), layers=[0], max_tokens=20_000, progress=False
    )
    editor = Editor(model, tokenizer, statistics=statistics)
    editor.edit(facts)
    yield model, tokenizer, facts, editor.hooks
    editor.detach()


def test_the_template_is_all_that_stands_around_a_message(chat):
    _, tokenizer, _, _ = chat
    tokenizer = copy.deepcopy(tokenizer)
    # A tokenizer that begins every text with its start token, as Llama's: not twice here.
    from tokenizers.processors import TemplateProcessing

    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    (ids,) = encode_chat("ask", tokenizer, ["Hello there."])
    assert tokenizer.decode(list(ids)) == f"{start}The book is old. Hello there."
    assert encode_chat("ask", tokenizer, []) == []


def test_replies_are_judged(chat):
    model, tokenizer, facts, hooks = chat
    found = evaluate(
        model, tokenizer, facts, hooks=hooks, chat=True, max_new_tokens=8, progress=False,
        details=True,
    )  # fmt: skip
    plain = evaluate(
        model, tokenizer, facts, hooks=hooks, generate=False, chat=True, max_new_tokens=8,
        progress=False,
    )  # fmt: skip
    assert found["chat"] == plain["chat"] and "generated" not in plain
    assert found["chat"]["after"]["reliability"] == 1.0
    assert found["chat"]["before"]["reliability"] == 0.0
    assert found["chat"]["before"]["locality"] == 1.0

    def replies(texts):
        rows = encode_chat("ask", tokenizer, texts)
        tokens = greedy(model, tokenizer, rows, max_new_tokens=8)
        return [tokenizer.decode(list(t), skip_special_tokens=True) for t in tokens]

    for fact, record in zip(facts, found["records"], strict=True):
        said = replies(fact.paraphrases)
        assert [r["after"] for r in record["replies"]["paraphrase"]] == said
        right = sum(contains(text, fact.target_new) for text in said) / len(said)
        assert record["values"]["after"]["chat"]["generality"] == right
        near = record["replies"]["neighborhood"]
        # Replies are shorter than the ten tokens that are compared.
        same = sum(r["before"] == r["after"] for r in near) / len(near)
        assert record["values"]["after"]["chat"]["locality"] == same


def test_what_cannot_be_asked_is_refused_first(chat):
    model, tokenizer, facts, _ = chat
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="evaluate: tokenizer must have a chat template"):
        evaluate(model, bare, facts, chat=True)
    # It fits with its answer, but not with the template.
    room = 128 - len(tokenizer(f"{facts[0].text} {facts[0].target_new}")["input_ids"])
    long = EditRequest(" the" * room + facts[0].text, facts[0].subject, facts[0].target_new)
    evaluate(model, tokenizer, [long], generate=False, progress=False)
    with pytest.raises(FactsError, match="context window of 128 tokens"):
        evaluate(model, tokenizer, [long], generate=False, chat=True, progress=False)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('A system message must come first.') }}", "A system message must"),
        ("{% for m in messages %}{{ m['content'] }}", "Unexpected end of template"),
        ("{{ messages[0].name.first }}", "'name'"),
    ],
)
def test_a_template_that_fails_is_named(chat, template, said):
    _, tokenizer, _, _ = chat
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    refused = r"(?s)^generate: tokenizer must have a chat template that takes .*, got one .*"
    with pytest.raises(ValueError, match=refused + said):
        encode_chat("generate", tokenizer, ["Hello there."])


def test_templates_need_jinja(chat, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="generate: chat must have the package jinja2"):
        encode_chat("generate", chat[1], ["Hello there."])


def test_commands_ask_in_a_chat(chat, tmp_path, capsys):
    model, tokenizer, _, _ = chat
    model_dir = tmp_path / "model"
    plain, _ = load_model(bundled.model_path())
    plain.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    (tmp_path / "text.txt").write_text("\n".join(bundled.texts()[:120]), encoding="utf-8")
    (tmp_path / "facts.json").write_text(json.dumps(bundled.facts()[:2]), encoding="utf-8")

    def call(*argv):
        return main([str(a) for a in argv])

    stats = ["--text", tmp_path / "text.txt", "--layers", "0", "--out", tmp_path / "stats"]
    assert call("stats", model_dir, *stats) == 0
    edits, facts = tmp_path / "edits", tmp_path / "facts.json"
    assert call("edit", model_dir, facts, "--stats", tmp_path / "stats", "--out", edits) == 0
    request = EditRequest.from_dict(bundled.facts()[0])
    capsys.readouterr()
    ask = ["--edits", edits, "--json", "--max-new-tokens", 8]
    assert call("generate", model_dir, request.text, "--chat", *ask) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["prompt"] == request.text and contains(said["edited"], request.target_new)
    assert call("eval", model_dir, facts, "--chat", *ask) == 0
    assert json.loads(capsys.readouterr().out)["chat"]["after"]["reliability"] == 1.0
    assert call("eval", model_dir, facts, "--chat", *ask[:2]) == 0
    assert "chat (in the reply)" in capsys.readouterr().out
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate.') }}"
    tokenizer.save_pretrained(model_dir)
    for command, asked in (("generate", "Hello"), ("eval", facts)):
        assert call(command, model_dir, asked, "--edits", edits, "--chat") == 2
        assert "one that fails: Roles must alternate." in capsys.readouterr().err
        assert call(command, bundled.model_path(), asked, "--edits", edits, "--chat") == 2
        assert "must have a chat template" in capsys.readouterr().err
