"""Edits in continuous batching, where a paged cache puts requests into one row."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coachhook.hooks import HookSet
from coachhook.hooks.paged import _OLDEST, PagedCues, PagedForward, _noted, is_paged
from coachhook.hooks.storage import CUE_TENSORS
from coachhook.ops.hooked_linear import checks
from coachhook.ops.hooked_linear.cues import REGISTER, armed_edits, blank_state
from coachhook.ops.hooked_linear.gate import Tokens

from ..models.families import tiny
from .support import CUED, GAPS, LAYERS, fired, generate, hooked, padded, prompts, together
from .test_no_waiting import Waits

SIZES = [{"page": 4, "blocks": 24, "batch": 8}, {"page": 16, "blocks": 16, "batch": 64}]


def _model(name: str = "llama", **changes: Any) -> Any:
    """A tiny model that knows no token for the end: helpers of decoding would shut it out."""
    changes = {"num_hidden_layers": 3 if name == "gemma3" else len(LAYERS)} | changes
    model = tiny(name, lambda arguments: arguments.update(changes)).double()
    model.generation_config.eos_token_id = None
    return model


def _alone(model: Any, rows: list[torch.Tensor], **settings: Any) -> list[list[int]]:
    return [generate(model, padded([row], "left"), **settings)[0].tolist() for row in rows]


def _tokens(outputs: list[Any]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs]


@contextmanager
def _watched(model: Any, look: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """``look`` is given the arguments of every forward of the model's base."""
    handle = model.model.register_forward_pre_hook(
        lambda _module, _args, given: look(given), with_kwargs=True
    )
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("scope", "size"),
    [("population", SIZES[0]), ("membership", SIZES[1]), *(("cued", size) for size in SIZES)],
)
def test_requests_answer_as_one_prompt_at_a_time(scope: str, size: dict[str, int]) -> None:
    model = _model()
    hooks = hooked(model, scope)
    rows = prompts(10)
    with hooks.record() as records:
        answers = _tokens(together(model, rows, **size))
    assert fired(records) > 0
    assert answers == _alone(model, rows)
    with hooks.disabled():
        plain = _alone(model, rows)
        assert _tokens(together(model, rows, **size)) == plain
    assert sum(one != other for one, other in zip(answers, plain, strict=True)) > 2


@pytest.mark.parametrize("shared", [True, False])
def test_several_answers_to_one_request(shared: bool) -> None:
    """Each is a copy of the request after its prompt; blocks that are not full are copied."""
    model = _model()
    hooked(model, "cued")
    rows = prompts(8)
    generation = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    config = {"allow_block_sharing": shared}
    for size in SIZES if shared else SIZES[:1]:
        answers = _tokens(together(model, rows, **size, generation=generation, config=config))
        each = len(answers) // len(rows)  # transformers 5.17 hands out one of them
        wanted = _alone(model, rows)
        assert [answers[i::each] for i in range(each)] == [wanted] * each


def test_requests_share_the_blocks_of_what_they_have_in_common() -> None:
    model = _model()
    hooked(model, "cued")
    common = prompts(1, 11)[0].repeat(2)[:8]
    rows = [torch.cat([common, row]) for row in prompts(12)]
    shared: list[int] = []

    def watch(given: dict[str, Any]) -> None:
        cache = given["cache"]
        search = type(cache).search_prefix_match

        def counted(*arguments: Any) -> int:
            shared.append(search(cache, *arguments))
            return shared[-1]

        cache.search_prefix_match = counted

    with _watched(model, watch):
        answers = _tokens(together(model, rows, page=4, blocks=32, batch=16))
    assert answers == _alone(model, rows)
    assert shared.count(8) > 6


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_layers_that_look_a_few_tokens_back(name: str) -> None:
    model = _model(name, sliding_window=8)
    rows = prompts(6)
    plain = _alone(model, rows, max_new_tokens=10)
    if _tokens(together(model, rows, page=4, generation={"max_new_tokens": 10})) != plain:
        pytest.skip("transformers itself answers otherwise")
    hooks = hooked(model, "cued")
    for size in SIZES if name == "gemma3" else SIZES[:1]:
        with hooks.record() as records:
            answers = _tokens(together(model, rows, **size, generation={"max_new_tokens": 10}))
        assert fired(records) > 0
        assert answers == _alone(model, rows, max_new_tokens=10) != plain


@pytest.mark.parametrize(
    ("scope", "include_padding"),
    [("sequence", False), ("prefix", False), ("prefix", True), ("cued", True)],
)
def test_scopes_that_would_take_requests_for_one_sequence_are_refused(
    scope: str, include_padding: bool
) -> None:
    model = _model()
    for layer in hooked(model, scope).values():
        layer.set_scope(layer.scope, include_padding)
    for answer in together(model, prompts(2)):
        assert "the cache must hold one sequence in a row" in answer.error
        assert not answer.generated_tokens


@contextmanager
def _off_at_first(hooks: HookSet, model: Any, how: str) -> Iterator[None]:
    """Hooks are off, or disabled, in every forward that reads several tokens of a sequence."""
    blocks = ExitStack()

    def begin(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        bounds = given.get("cu_seq_lens_q")
        if (given["input_ids"].shape[1] if bounds is None else int(bounds.diff().max())) == 1:
            return
        if how == "disabled":
            blocks.enter_context(hooks.disabled())
        else:
            hooks.set_state("off")
            blocks.callback(hooks.set_state, "validated")

    first = model.register_forward_pre_hook(begin, with_kwargs=True)
    last = model.register_forward_hook(lambda *_: blocks.close())
    yield
    first.remove()
    last.remove()


@pytest.mark.parametrize("how", ["off", "disabled"])
def test_what_others_left_in_a_block_is_not_taken_for_a_request_s_own(how: str) -> None:
    model = _model()
    hooks = hooked(model, "cued")
    config = {"allow_block_sharing": False}
    kept = {"page": 4, "blocks": 40, "batch": 128, "config": config, "persistent_manager": True}
    for seed in (5, 6):  # until every block was somebody's
        rows = prompts(8, seed)
        assert _tokens(together(model, rows, **kept)) == _alone(model, rows)
    # Prompts are read at once, so that no request decodes in a forward without hooks.
    rows = prompts(8, 9)
    with _off_at_first(hooks, model, how), hooks.record() as records:
        answers = _tokens(together(model, rows, **kept))
        assert fired(records) > 0
        assert answers == _alone(model, rows)


@pytest.mark.parametrize("count", [CUED, CUED - 1])
def test_other_edits_have_read_no_cue_of_a_text_that_goes_on(count: int) -> None:
    model = _model()
    hooks = hooked(model, "cued")
    edits = {index: layer.snapshot() for index, layer in hooks.items()}
    forwards: list[None] = []

    def change(*_: Any) -> None:
        forwards.append(None)
        for index, layer in hooks.items() if len(forwards) == 3 else ():
            kept = edits[index].stored.tensors
            v, at = kept["left"][:, :count], kept["right"][:count]
            layer.set_pair(-v, at, None, "own", *(kept[name][:count] for name in CUE_TENSORS))

    model.register_forward_pre_hook(change)
    for row in prompts(3):
        found = []
        for ask in (_alone, lambda *given: _tokens(together(*given))):
            forwards.clear()
            for index, layer in hooks.items():
                layer.restore(edits[index])
            with hooks.record() as records:
                found.append((ask(model, [row]), fired(records)))
        assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_no_block_is_written_twice_in_one_forward(name: str) -> None:
    """Of several tokens it is the last: two copies to one place have no order on a GPU."""
    model = _model(name, sliding_window=8)
    layer = hooked(model, "cued")[0]
    written = []

    def look(given: dict[str, Any]) -> None:
        page = PagedForward(given["cache"], given, given["input_ids"].shape[1])
        page.open(0, layer._gaps, layer._store.version)
        unread = page._places.target.max()  # the last row takes what nobody reads
        written.append([row for row in page._places.target.tolist() if row != unread])

    with _watched(model, look):
        _tokens(together(model, prompts(6), page=4, blocks=40))
    assert all(len(rows) == len(set(rows)) for rows in written)
    assert max(len(rows) for rows in written) >= 12


def test_a_table_of_blocks_says_what_the_indices_say() -> None:
    """Kernels that read the cache themselves are given the blocks of each request instead."""
    model = _model()
    hooks = hooked(model, "cued")
    layer = hooks[0]
    checked = []

    def compare(given: dict[str, Any]) -> None:
        cache, bounds = given["cache"], given["cu_seq_lens_q"]
        lengths = given["cu_seq_lens_k"]
        lengths = lengths["full_attention"] if isinstance(lengths, dict) else lengths
        if not given["read_index"][0].numel() or int(bounds.diff().max()) > 1:
            return
        managers = getattr(cache, "group_cache_managers", None)
        allocator = managers[0] if managers else cache.cache_allocators["full_attention"]
        table = torch.full((1, bounds.shape[0] - 1, 16), -1, dtype=torch.int32)
        first = given["read_index"][0][lengths[:-1].long()]
        stride = getattr(allocator, "block_physical_stride", 4)
        owner = {blocks[0]: name for name, blocks in allocator.block_table.items()}
        for i, (slot, length) in enumerate(
            zip(first.tolist(), lengths.diff().tolist(), strict=True)
        ):
            cache.fill_block_table(owner[slot // stride], length - 1, 1, table[:, i])
        tabled = {**given, "block_table": table, "read_index": None, "write_index": None}
        tabled |= {"read_index": [torch.empty(0)], "write_index": [torch.empty(0)]}
        results = []
        for arguments in (given, tabled):
            page = PagedForward(cache, arguments, given["input_ids"].shape[1])
            opened = page.open(0, layer._gaps, layer._store.version)
            page.close(0, opened[1].fill_(7), layer._gaps, layer._store.version)
            results.append((*opened, *(getattr(page._places, n) for n in ("target", "before"))))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
        checked.append(len(first))

    with _watched(model, compare):
        outputs = together(
            model, prompts(6), page=4, blocks=32, config={"allow_block_sharing": False}
        )
    assert [output.error for output in outputs] == [None] * 6
    assert max(checked) > 3


def test_blocks_that_are_moved_past_the_cache_are_refused() -> None:
    model = _model()
    hooked(model, "cued")
    managers = []

    def offload(given: dict[str, Any]) -> None:
        # A manager has a pool on the CPU only beside a GPU: given one here, of no blocks.
        for held in gc.get_referrers(given["cache"]):
            fields = held if isinstance(held, dict) else vars(held)
            for name, pool in (("_cpu_pool", object()), ("_num_cpu_blocks", 1)):
                if name in fields:
                    fields[name] = pool
                    managers.append(name)

    with _watched(model, offload):
        answers = together(model, prompts(2))
    assert managers
    assert all("cpu_offload_space of continuous batching must be 0" in a.error for a in answers)


def test_a_cache_of_another_kind_is_refused_in_words() -> None:
    cache = SimpleNamespace(update=None)
    assert is_paged(cache)
    with pytest.raises(TypeError, match="must lay out its blocks as transformers"):
        PagedForward(cache, {}, 4).open(0, GAPS, torch.tensor(1))
    cache.group_cache_managers, cache.block_size, cache.num_blocks = [object()], 4, 8
    with pytest.raises(TypeError, match="must hold cu_seq_lens_q.*got none of cu_seq_lens_q"):
        PagedForward(cache, {}, 4).open(0, GAPS, torch.tensor(1))


def test_nobody_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_BACKEND", "reference")
    monkeypatch.setattr(checks, "_check_membership", lambda *_: None)
    monkeypatch.setattr(checks, "_check_cu_seqlens", lambda _op, _given, ends: len(ends) - 1)
    model = _model()
    hooks = hooked(model, "cued")
    counts: list[Waits] = []

    def begin(*_: Any) -> None:
        counts.append(Waits())
        counts[-1].__enter__()

    def waits() -> list[Counter[str]]:
        counts.clear()
        _tokens(together(model, prompts(6), page=4, blocks=24, batch=8))
        return [count.seen for count in counts]

    # Around what the hooks on the base do, too.
    model.model.register_forward_pre_hook(begin, prepend=True)
    model.model.register_forward_hook(lambda *_: counts[-1].__exit__(None, None, None))
    with hooks.disabled():
        plain = waits()
    with hooks.record() as records:
        assert waits() == plain
    assert len(plain) > 6
    assert fired(records) > 0


# Armed for ever, for some tokens, and for some tokens after two; the last one for ever again.
FAR = torch.tensor([2**31 - 1, 8, 40, 8, 59, 20, 62], dtype=torch.int32)
APART = torch.tensor([0, 0, 0, 1, 3, 7, 5], dtype=torch.int32)
BOUNDED = FAR.long() + APART < REGISTER
EDITS = len(FAR)
LIMITS = torch.full((EDITS,), 0.5)


def _armed(
    reached: torch.Tensor, state: torch.Tensor | None, bounds: torch.Tensor | None = None
) -> torch.Tensor:
    """Of tokens ``[T, edits]`` of one sequence, in the form of a paged forward's."""
    bounds = torch.tensor([0, len(reached)]) if bounds is None else bounds
    tokens = Tokens.of(reached, None, bounds)
    return armed_edits(reached.float(), tokens, LIMITS, state, FAR, APART)


def _reached(length: int, seed: int) -> torch.Tensor:
    """Which tokens reach which limits: more of them where two are needed."""
    share = torch.where(APART > 0, 0.2, 0.04)
    return torch.rand(length, EDITS, generator=torch.Generator().manual_seed(seed)) < share


def test_what_was_seen_of_cues_at_every_token_of_a_forward() -> None:
    """Of the last tokens exactly; else no later than it was, and as late as the register allows."""
    length = 100
    reached = _reached(length, 3)
    state = blank_state(1, EDITS, reached.device)
    state[:, 0] = _OLDEST
    _armed(reached, state)
    nothing, token = torch.zeros(length, dtype=torch.int64), torch.arange(length)
    ages, hits = (noted.tolist() for noted in _noted(state, APART, nothing, token + 1))
    exact = guessed = 0
    for edit, (gap, bounded) in enumerate(zip(APART.tolist(), BOUNDED.tolist(), strict=True)):
        last = None
        for t in range(length):
            if reached[t, edit] and (not bounded or (t >= gap and reached[t - gap, edit])):
                last = t
            told = max(REGISTER - (length - 1 - t), 0)
            if bounded:
                before = [t - i >= 0 and bool(reached[t - i, edit]) for i in range(8)]
                wanted = sum((before[i] if i < told else True) << i for i in range(8))
                assert hits[t][edit] == wanted
            if last is None:
                assert ages[t][edit] == 0
            elif not bounded:
                assert ages[t][edit] > 0
            elif t - last < told - gap:
                assert ages[t][edit] == t - last + 1
                exact += 1
            else:
                assert ages[t][edit] == min(t - last + 1, max(1, told - gap + 1))
                guessed += ages[t][edit] < t - last + 1
    assert exact > 100 and guessed > 50


def _forward(cache: Any, past: int, count: int) -> PagedForward:
    """The next ``count`` tokens of one request, whose slots are those of its columns."""
    given = {
        "cu_seq_lens_q": torch.tensor([0, count], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, past + count], dtype=torch.int32),
        "read_index": [torch.arange(past + count)],
        "write_index": [torch.arange(past, past + count)],
    }
    return PagedForward(cache, given, count)


class _Cache:
    """As much of a paged cache as is asked for."""

    def __init__(self, block_size: int, num_blocks: int = 200) -> None:
        self.group_cache_managers, self.update = [object()], None
        self.block_size, self.num_blocks = block_size, num_blocks


def _read(cache: _Cache, past: int, reached: torch.Tensor, version: torch.Tensor) -> torch.Tensor:
    page = _forward(cache, past, len(reached))
    bounds, state = page.open(0, APART, version)
    armed = _armed(reached, state, bounds)
    page.close(0, state, APART, version)
    page.pass_over()
    return armed


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("chunk", [1, 3, 8, 50])
def test_a_text_in_parts_arms_what_it_arms_as_a_whole(size: int, chunk: int) -> None:
    """Also where some parts are read without the hook: as text that reaches no limit."""
    version, cache = torch.tensor(1), _Cache(size)
    reached, past, found, read = _reached(200, 5), 0, [], []
    generator = torch.Generator().manual_seed(chunk)
    while past < 200:
        count = int(torch.randint(1, chunk + 1, (), generator=generator))
        part = reached[past : past + count]
        read += [len(found) % 4 != 2] * len(part)
        if read[-1]:
            found.append(_read(cache, past, part, version))
        else:
            _forward(cache, past, len(part)).pass_over()
            found.append(part.fill_(False))
        past += len(part)
    armed, got, rows = _armed(reached, None), torch.cat(found), torch.tensor(read)
    assert torch.equal(got[rows], armed[rows]) and not rows.all()
    assert (got.sum(dim=0) > 10).all() and not got.all(dim=0).any()


def test_a_text_goes_on_from_any_token_of_a_long_forward() -> None:
    """What follows is armed as in one text, or more where it comes from further back in a forward.

    Tokens that merely count as hits arm nothing by themselves.
    """
    version, cache, length = torch.tensor(1), _Cache(1), 100
    reached, quiet = _reached(length, 7), torch.zeros(60, EDITS, dtype=torch.bool)
    _read(cache, 0, reached, version)
    more = unarmed = 0
    for past in range(1, length):
        for after in (_reached(60, past), quiet):
            bounds, state = _forward(cache, past, len(after)).open(0, APART, version)
            found = _armed(after, state, bounds)
            whole = _armed(torch.cat([reached[:past], after]), None)
            wanted = whole[past:]
            assert (found >= wanted).all()
            exact = (FAR.long() + APART + length - past <= REGISTER) | ~BOUNDED
            assert torch.equal(found[:, exact], wanted[:, exact])
            more += int((found > wanted).sum())
        without = BOUNDED & ~whole.any(dim=0)
        assert not found[:, without].any()
        unarmed += int(without.sum())
    assert more > 0 and unarmed > 50


def test_copied_blocks_take_everything_along() -> None:
    cues = PagedCues(_Cache(4, 8))
    tables = cues.tables(0, EDITS, torch.device("cpu"))
    assert len(tables) == 3
    for table in tables:
        table.copy_(torch.arange(table.numel()).view_as(table))
    before = [table.clone() for table in tables]
    cues.copy_blocks([2, 5], [0, 7])
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table[[0, 7]], old[[2, 5]])
        assert torch.equal(table[1:7], old[1:7]) and not torch.equal(table, old)
