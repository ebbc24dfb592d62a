"""The network above one block: runs of the tokens that a change can reach against whole runs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version

from coachhook import EditRequest
from coachhook.editing.encoding import encode_requests
from coachhook.editing.live import Live, first_tensor
from coachhook.editing.packing import group_cost, pack
from coachhook.editing.room import free_memory
from coachhook.editing.suffix import Suffix
from coachhook.editing.targets import optimise_targets
from coachhook.models import describe
from tests.models.families import DISCOVERED, EXPERTS, INDIRECT, LAYERS, SUPPORTED, tiny

WIDTH = 19
PADDED = [WIDTH, 7, 12, 15, 1, 12]
TRANSFORMERS = Version(transformers.__version__)
# MPT, Bloom and VaultGemma take their softmax in float32, GPT-Neo its attention; so did GPT-J and
# CodeGen.
SINGLE = (
    "mpt",
    "bloom",
    "vaultgemma",
    "gpt_neo",
    "gemma2",
    *(("gptj", "codegen") if TRANSFORMERS < Version("5.24") else ()),
)
# Their norms are in float32, where the gradients of the last block's two runs are rounded apart.
SINGLE_NORMS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo", "cohere", "granite"),
    *INDIRECT,
)


def in_float64(family):
    if family == "mpt" and TRANSFORMERS < Version("5"):
        pytest.skip("transformers 4 cannot mask MPT's attention in float64")
    return tiny(family).double()


@pytest.fixture(autouse=True)
def one_threads_groups(monkeypatch):
    """Groups do not depend on the threads of the machine."""
    for module in ("suffix", "live"):
        monkeypatch.setattr(f"coachhook.editing.{module}.group_cost", lambda device: 16)


@contextmanager
def _tokens_seen(block):
    """Positions of each call of a block that comes to its end."""
    seen = []
    handle = block.register_forward_hook(
        lambda _m, args, _o: seen.append(args[0].shape[:2].numel())
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("every", [True, False], ids=["all asked", "some asked"])
@pytest.mark.parametrize("lengths", [[WIDTH] * len(PADDED), PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("family", SUPPORTED | DISCOVERED)
def test_live_tokens_give_what_the_whole_run_gives(family, lengths, every):
    """Outputs and gradients, of all families, for a change at the first tokens and later ones."""
    model = in_float64(family)
    suffix = Suffix(model, describe(model), 0)
    lengths = torch.tensor(lengths)
    ids = torch.randint(3, 64, (len(lengths), WIDTH))
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    captured = suffix.capture(ids, mask, keep=True, loss_layer=1)
    assert captured.kept is not None
    rows = torch.tensor([4, 0, 2, 1, 5])
    first = lengths[rows] * torch.tensor([0, 1, 2, 3, 1]) // 4
    # Another number of tokens in each row.
    asked = (torch.arange(WIDTH) % torch.tensor([2, 3, 4, 5, 7])[:, None] == 0) & mask[rows].bool()
    part = suffix.select(captured, torch.arange(6), lengths // 5)
    live = suffix.select(part, rows, first, None if every else asked)
    whole = captured.select(rows)
    assert isinstance(live, Live) and live.tokens < len(rows) * WIDTH
    assert torch.equal(live.hidden, whole.hidden)
    single = family in SINGLE or (not every and family in SINGLE_NORMS)
    rtol = 1e-6 if single else 1e-10
    with _tokens_seen(suffix._above[-1]) as seen:
        suffix.run(live, live.hidden, None)
    assert (sum(seen) == live.tokens) is every
    for loss_layer in (1, None):
        results = []
        for run in (live, whole):
            delta = torch.randn(len(rows), 32, generator=torch.Generator().manual_seed(3)).double()
            delta.requires_grad_()
            hidden = run.hidden.index_put((torch.arange(len(rows)), first), delta, accumulate=True)
            outputs = suffix.run(run, hidden, loss_layer)
            # Of what comes before, a run of live tokens says nothing.
            real = mask[rows].bool() & (torch.arange(WIDTH) >= first[:, None])
            at_end = real if every else real & asked
            found = [outputs[0][real if loss_layer else at_end], outputs[1][at_end]]
            total = sum(torch.tanh(x).sum() for x in found)
            results.append(found + list(torch.autograd.grad(total, delta)))
        for found, wanted in zip(*results, strict=True):
            assert (found - wanted).norm() <= rtol * wanted.norm()


@pytest.mark.parametrize("family", SUPPORTED | DISCOVERED)
def test_rows_of_other_lengths_are_captured_apart_to_the_same_end(family, monkeypatch):
    model = in_float64(family)
    lengths = torch.tensor(PADDED)
    ids = torch.randint(3, 64, (len(lengths), WIDTH))
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    found = []
    for cost, tokens in ((0, [1, 7, 24, 15, 19]), (0.5, [1, 36, 38]), (100, [6 * WIDTH])):
        monkeypatch.setattr("coachhook.editing.suffix.MODEL_COST", cost)
        suffix = Suffix(model, describe(model), 0)
        with _tokens_seen(suffix._below[0]) as seen:
            found.append(suffix.capture(ids, mask, keep=True))
        assert suffix._packs and suffix._keeps and found[-1].kept is not None
        assert seen == tokens
    *others, padded = (captured.kept for captured in found)
    real, rtol = mask.bool(), 1e-6 if family in SINGLE else 1e-10

    def same(x, y):
        assert (x - y).norm() <= rtol * y.norm()

    for packed in others:
        same(packed.hidden[real], padded.hidden[real])
        assert (packed.own is not None) is (family in INDIRECT)
        if family in INDIRECT:
            same(packed.own[real], padded.own[real])
        for ours, theirs in zip(packed.past, padded.past, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                same(x.transpose(1, 2)[real], y.transpose(1, 2)[real])
    rows = torch.arange(len(lengths))
    hidden = torch.where(real[..., None], padded.hidden, 0)
    for run in (lambda c: c.select(rows), lambda c: suffix.select(c, rows, lengths // 2)):
        *outputs, wanted = (suffix.run(run(captured), hidden, None)[1] for captured in found)
        live = real & (torch.arange(WIDTH) >= lengths[:, None] // 2)
        for output in outputs:
            same(output[live], wanted[live])


@pytest.mark.parametrize("family", SUPPORTED | DISCOVERED)
def test_log_probabilities_are_those_of_the_model(family):
    model = in_float64(family)
    description = describe(model)
    suffix = Suffix(model, description, LAYERS - 1)
    ids = torch.randint(3, 60, (2, 7))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        found = suffix.log_probs(suffix.capture(ids, mask).hidden)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.double()
    torch.testing.assert_close(found, logits.log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_changed_state_goes_through_blocks_with_experts_as_in_the_model(family):
    """Also where a block reads more of the one below it than its hidden state."""
    if not hasattr(transformers, EXPERTS[family][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {EXPERTS[family][0]}")
    model = tiny(family)
    suffix = Suffix(model, describe(model), 0)
    lengths = torch.tensor(PADDED)
    ids = torch.randint(3, 64, (len(lengths), WIDTH))
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    captured = suffix.capture(ids, mask, keep=True)
    rows = torch.tensor([4, 0, 2])
    first = lengths[rows] // 3
    chosen = suffix.select(captured, rows, first)
    each = torch.arange(len(rows))
    hidden = chosen.hidden.clone()
    hidden[each, first] *= -1
    _, found = suffix.run(chosen, hidden, None)
    seen = []

    def change(_module, _args, output):
        states = first_tensor(output).clone()
        states[rows[each], first] *= -1
        return states if isinstance(output, torch.Tensor) else (states, *output[1:])

    handles = [
        suffix._below[-1].register_forward_hook(change),
        suffix._above[-1].register_forward_hook(lambda _m, _a, o: seen.append(first_tensor(o))),
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    real = (torch.arange(WIDTH) >= first[:, None]) & mask[rows].bool()
    wanted = seen[0][rows][real]
    assert (found[real] - wanted).norm() <= 1e-4 * wanted.norm()


def test_what_a_token_takes_goes_by_the_experts_that_read_it():
    def size(**changes):
        model = tiny("mixtral", lambda arguments: arguments.update(changes))
        return Suffix(model, describe(model), 0).bytes_per_token

    usual = size(num_local_experts=4, num_experts_per_tok=2)
    assert size(num_local_experts=16, num_experts_per_tok=2) < 1.5 * usual
    assert size(num_local_experts=4, num_experts_per_tok=4) > 1.3 * usual


def test_an_argument_of_unknown_layout_is_not_merged(caplog):
    """The prompts are padded together instead."""
    model = tiny("llama").double()
    suffix = Suffix(model, describe(model), 0)
    lengths = torch.tensor(PADDED * 10)
    ids = torch.randint(3, 64, (len(lengths), WIDTH))
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    handle = suffix._above[0].register_forward_pre_hook(
        lambda _m, args, kwargs: (args, kwargs | {"odd": args[0].sum((1, 2))}), with_kwargs=True
    )
    caplog.set_level("INFO")
    captured = suffix.capture(ids, mask, keep=True)
    handle.remove()
    assert not suffix._packs and "odd must be laid out in a known way" in caplog.text
    assert captured.hidden.shape[:2] == ids.shape


def test_blocks_that_fill_no_cache_are_run_whole():
    model = tiny("llama").double()
    suffix = Suffix(model, describe(model), 0)
    ids = torch.randint(3, 64, (3, 9))
    block = model.get_submodule("model.layers.2")
    inner = block.forward
    block.forward = lambda hidden_states, attention_mask=None, position_embeddings=None, **_: inner(
        hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings
    )
    captured = suffix.capture(ids, torch.ones_like(ids), keep=True)
    assert captured.kept is None
    rows = torch.tensor([2, 0])
    chosen = suffix.select(captured, rows, torch.tensor([3, 4]))
    _, final = suffix.run(chosen, chosen.hidden, None)
    expected = model.model(ids).last_hidden_state[rows]
    torch.testing.assert_close(model.model.norm(final), expected)


def test_a_last_block_that_cannot_be_asked_twice_is_run_for_all_tokens():
    model = tiny("llama").double()
    ids = torch.randint(3, 64, (6, WIDTH))
    block = model.get_submodule("model.layers.2")
    inner = block.forward

    def forward(hidden_states, *args, **kwargs):
        """Goes by the number of tokens it is given."""
        return inner(hidden_states, *args, **kwargs) * (1 + (hidden_states.shape[1] < 8))

    block.forward = forward
    suffix = Suffix(model, describe(model), 0)
    captured = suffix.capture(ids, torch.ones_like(ids), keep=True)
    first = torch.full((6,), 5)
    wanted = torch.arange(WIDTH).expand(6, -1) == WIDTH - 1
    later = Suffix(model, describe(model), 0)
    later.recall(suffix)  # and does not compare again
    again = later.capture(ids, torch.ones_like(ids), keep=True)
    for knowing, there in ((suffix, captured), (later, again)):
        live = knowing.select(there, torch.arange(6), first, wanted)
        assert isinstance(live, Live)
        _, found = knowing.run(live, live.hidden, None)
        _, expected = knowing.run(there, there.hidden, None)
        assert (found - expected)[wanted].norm() <= 1e-10 * expected[wanted].norm()


def test_a_block_that_looks_ahead_is_run_whole():
    """What comes before a change is constant in causal blocks only; others are found out."""
    model = tiny("llama").double()
    suffix = Suffix(model, describe(model), 0)
    ids = torch.randint(3, 64, (3, 9))
    block = model.get_submodule("model.layers.1")
    handle = block.register_forward_pre_hook(
        lambda _module, args, kwargs: (
            (args[0] + args[0].mean(1, keepdim=True), *args[1:]),
            kwargs,
        ),
        with_kwargs=True,
    )
    try:
        assert suffix.capture(ids, torch.ones_like(ids), keep=True).kept is None
    finally:
        handle.remove()


def test_what_one_batch_showed_of_the_blocks_is_not_tried_again(make_editor, requests, monkeypatch):
    """Live runs are compared with whole ones again for longer prompts, or blocks that changed."""
    editor, model, _ = make_editor(rewordings=0)
    compared = []
    compare = Suffix._difference
    monkeypatch.setattr(
        Suffix, "_difference", lambda self, *a: compared.append(self) or compare(self, *a)
    )
    times = []

    def edit(request):
        compared.clear()
        editor.edit([request])
        times.append(len(compared))

    edit(requests[0])
    editor._suffix.replays = True
    edit(requests[0])
    assert editor._suffix.replays is True
    edit(replace(requests[1], prompt="All people who live here have known for long that {} is of"))
    block = model.get_submodule("transformer.h.1")
    handle = block.mlp.register_forward_hook(lambda *_: None)
    edit(requests[0])
    assert editor._suffix.replays is None
    edit(requests[0])
    handle.remove()
    edit(requests[0])
    inner = block.mlp.forward
    block.mlp.forward = lambda *args: inner(*args)
    edit(requests[0])
    del block.mlp.forward
    edit(requests[0])
    assert times == [1, 0, 1, 1, 0, 1, 1, 1]


def test_a_refusal_is_forgotten_with_the_batch(make_editor, requests, monkeypatch):
    """It may have been of that batch alone."""
    editor, _, _ = make_editor(rewordings=0)
    monkeypatch.setattr(Suffix, "_difference", lambda *_: float("nan"))
    editor.edit(requests[:1])
    assert not editor._suffix._keeps
    monkeypatch.undo()
    editor.edit(requests[:1])
    assert editor._suffix._keeps


def test_activations_above_are_fused_in_16_bits_where_no_key_is_read(make_editor, requests):
    """While targets are optimised; the edited block's, which makes the keys, never is."""
    editor, model, _ = make_editor(dtype=torch.bfloat16, rewordings=0)
    layer = editor.config.layers[-1]
    fused = {}
    blocks = enumerate(model.get_submodule("transformer.h"))
    activations = {number: block.mlp.act for number, block in blocks}
    for number, act in activations.items():
        here = fused.setdefault(number, [])
        act.register_forward_pre_hook(lambda act, _, here=here: here.append("forward" in vars(act)))
    editor.edit(requests[:2])
    assert all(not any(here) for number, here in fused.items() if number <= layer)
    assert all(here and all(here) for number, here in fused.items() if number > layer)
    assert not any("forward" in vars(act) for act in activations.values())


def test_no_weight_asks_for_a_gradient_meanwhile(make_editor, requests):
    editor, model, tokenizer = make_editor()
    seen = []
    handle = model.get_submodule("transformer.h.1").register_forward_hook(
        lambda module, _args, output: seen.append(
            [torch.is_grad_enabled(), any(p.requires_grad for p in module.parameters())]
        )
    )
    editor.edit(requests[:2])
    handle.remove()
    differentiated = [asks for grad, asks in seen if grad]
    assert differentiated and not any(differentiated)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_packing_has_the_least_padding():
    assert pack([5, 1, 5, 2], group_cost=0) == [[1], [3], [0, 2]]
    assert pack([5, 1, 5, 2], group_cost=100) == [[1, 3, 0, 2]]
    assert pack([5, 1, 5, 2], group_cost=2) == [[1, 3], [0, 2]]
    assert pack([], group_cost=2) == []


def test_targets_in_a_batch_are_those_of_one_at_a_time(make_editor, requests):
    for preset in ("default", "paper"):
        editor, model, tokenizer = make_editor(preset, target_steps=8)
        model.double()  # what float32 rounds away grows in the steps, on some processors to 1e-4
        # Prompts of several lengths, with gates that have been edited.
        editor.edit(requests[:2])
        batch = [
            *requests[2:5],
            EditRequest(
                prompt="Long ago, as all people here know, the capital of {} was",
                subject=requests[0].subject,
                target_new="Danube",
            ),
        ]
        encoded = encode_requests(tokenizer, batch, editor.config.contexts, None)
        together = optimise_targets(model, describe(model), encoded, editor.config, pad_id=0)
        for i, one in enumerate(encoded):
            alone = optimise_targets(model, describe(model), [one], editor.config, pad_id=0)
            difference = (together.values[:, i] - alone.values[:, 0]).norm()
            assert difference <= 1e-6 * alone.values.norm(), preset
            assert together.steps[i] == alone.steps[0]


def test_the_bar_counts_every_request(make_editor, requests, capsys):
    editor, _, _ = make_editor(target_steps=12)
    editor.edit(requests[:3])
    assert capsys.readouterr().err == ""
    editor.edit(requests[3:6], progress="targets")
    err = capsys.readouterr().err
    assert "targets: 100%" in err and "3/3" in err


def test_free_memory_of_a_container(tmp_path):
    cpu = torch.device("cpu")
    assert free_memory(cpu, str(tmp_path)) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5000 kB\n")
    assert free_memory(cpu, str(tmp_path)) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("100\n")
    assert free_memory(cpu, str(tmp_path)) == 5000 * 1024
    (group / "memory.max").write_text("1000\n")
    assert free_memory(cpu, str(tmp_path)) == 900
    assert free_memory(torch.device("meta")) is None


def test_a_group_costs_more_tokens_on_more_threads(monkeypatch):
    cpu = torch.device("cpu")
    for threads, cost in ((1, 16), (2, 32), (64, 256)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert group_cost(cpu) == cost
    assert group_cost(torch.device("cuda")) == 1024
