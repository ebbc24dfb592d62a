"""Appends replayed from a CUDA graph: right, repeatable, atomic, and really replayed."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import Tensor

from coachhook.bench.memory import append as repeated
from coachhook.bench.memory import filled as bench_filled
from coachhook.bench.memory import targets_of
from coachhook.editing import captured
from coachhook.editing.captured import Step, padded
from coachhook.editing.memory import EditMemory
from tests.ops.linalg_oracle import F64, batches, joint, relative, spd
from tests.tolerances import tol

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

N, M = 300, 9
PRIOR, ROOT = spd(N, 1e3)


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch):
    """A graph that cannot be captured is an error here."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="append: a CUDA graph")
        yield


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows of the replays so far."""
    seen: list[int] = []
    run = Step.run

    def counted(step, buffers):
        if step._graph is not None:
            seen.append(len(step.keys))
        return run(step, buffers)

    monkeypatch.setattr(Step, "run", counted)
    return seen


def made_of(counts: list[int], *, isotropic: bool = False) -> list[tuple[Tensor, Tensor]]:
    made = [
        batches(ROOT, 1, count, M, isotropic=isotropic, seed=5 + i)[0]
        for i, count in enumerate(counts)
    ]
    return [(keys.cuda(), targets.cuda()) for keys, targets in made]


def filled(made: list[tuple[Tensor, Tensor]], dtype: torch.dtype = F64) -> EditMemory:
    memory = EditMemory(PRIOR.cuda(), M, dtype=dtype, max_keys=10**6)
    for keys, targets in made:
        memory.append(keys, targets)
    return memory


def by_solves(made: list[tuple[Tensor, Tensor]], dtype: torch.dtype = F64) -> EditMemory:
    """The same without fixed shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "_takes", lambda prior, keys: False)
        return filled(made, dtype)


def state(memory: EditMemory) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in memory.state_dict()[0].items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[x], second[x]) for x in first)


def exact_delta(made: list[tuple[Tensor, Tensor]]) -> Tensor:
    return joint(PRIOR, [(keys.cpu(), targets.cpu()) for keys, targets in made])


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize(
    "counts, least",
    [
        ([5] * 10, 8),
        ([32] * 9, 5),  # grows from 256 rows to 384
        ([40, 3, 64, 33, 1, 20, 16, 50, 7, 31], 3),
        ([100, 128, 70, 128], 0),
        ([20, 20, 130, 20, 20], 1),
    ],
)
def test_state_is_that_of_solves(replays, counts, least, dtype):
    made = made_of(counts)
    memory, other = filled(made, dtype), by_solves(made, dtype)
    assert len(replays) >= least
    found, expected = state(memory), state(other)
    for name in ("keys", "targets"):
        assert torch.equal(found[name], expected[name])
    for name in ("solved", "root"):
        size = 1e3 * float(expected[name].abs().max())
        limit = tol("solve", dtype, reduction=N + sum(counts), scale=size)
        torch.testing.assert_close(found[name], expected[name], **limit)
    assert relative(memory.delta().cpu(), exact_delta(made)) < (1e-10 if dtype == F64 else 1e-3)


@pytest.mark.parametrize("before", [0, 1, 5])
def test_equal_bits_whether_replayed_or_not(replays, before):
    """Of one append again and again, and of a history again."""
    *made, batch = made_of([20] * (before + 1))
    states = []
    for _ in range(2):
        memory = filled(made)
        kept, untouched = memory.snapshot(), state(memory)
        for _ in range(6):
            memory.append(*batch)
            states.append(state(memory))
            memory.restore(kept)
            assert same(state(memory), untouched)
    assert len(replays) >= 8 and all(same(states[0], other) for other in states)


def test_the_benchmark_finds_its_graph(replays):
    prior = PRIOR.cuda()
    keys = made_of([32])[0][0]
    for count in (0, 64):
        memory = bench_filled(prior, keys, count)
        for _ in range(2):
            repeated(memory, keys, targets_of(keys))
        before = len(replays)
        for _ in range(5):
            repeated(memory, keys, targets_of(keys))
        assert replays[before:] == [32] * 5


def test_other_dtypes_and_layouts_of_a_batch(replays):
    """Copied by one kernel where they are of the memory's dtype, else by torch."""
    made = made_of([20] * 7)
    memory, other = filled(made[:3]), filled(made[:3])
    for index, (keys, targets) in enumerate(made[3:]):
        keys, targets = keys.float(), targets.float()
        other.append(keys.double(), targets.double())
        if index % 2:
            memory.append(keys, targets)
        else:
            wide = torch.full((2 * N, 60), float("nan"), dtype=F64, device="cuda")
            wide[::2, ::3] = keys.double()
            memory.append(wide[::2, ::3], targets.double().mT.contiguous().mT)
    assert same(state(memory), state(other)) and len(replays) >= 8


def test_several_memories_in_turn(replays):
    made = [made_of([count] * 7, isotropic=True) for count in (3, 17, 6)]
    memories = [EditMemory(PRIOR.cuda(), M, max_keys=10**6) for _ in made]
    for step in range(7):
        for memory, own in zip(memories, made, strict=True):
            memory.append(*own[step])
    assert sorted(replays) == [32] * 15
    for memory, own in zip(memories, made, strict=True):
        assert relative(memory.delta().cpu(), exact_delta(own)) < 1e-11


def test_several_threads(replays):
    """Each with its stream and its memory; the graphs share their scratch memory."""
    made = [made_of([count] * 8) for count in (3, 17, 6)]
    memories = [EditMemory(PRIOR.cuda(), M, max_keys=10**6) for _ in made]
    torch.cuda.synchronize()

    def work(memory: EditMemory, own: list[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for batch in own:
                memory.append(*batch)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(memories, made, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for memory, own in zip(memories, made, strict=True):
        assert relative(memory.delta().cpu(), exact_delta(own)) < 1e-11


@pytest.mark.parametrize("before", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["keys", "targets", "overflow"])
def test_a_failing_append_leaves_nothing(before, kind):
    """In the first run, in that before a capture, and in replays."""
    *made, good, (keys, targets) = made_of([6] * (before + 2))
    memory = filled(made)
    kept, contents = state(memory), memory.contents()
    if kind == "overflow":
        keys = torch.full_like(keys, 1e200)
    else:
        (keys if kind == "keys" else targets)[2, 4] = float("nan")
    match = "size that can be squared" if kind == "overflow" else f"{kind} must be finite"
    for _ in range(3):
        with pytest.raises(ValueError, match=match):
            memory.append(keys, targets)
        assert same(state(memory), kept)
        assert all(x is y for x, y in zip(contents, memory.contents(), strict=True))
    for _ in range(3):
        memory.append(*good)
    assert relative(memory.delta().cpu(), exact_delta([*made, *[good] * 3])) < 1e-11


@pytest.mark.parametrize("scale", [1e2, 1e5, 1e7])
def test_batches_that_determine_too_much_are_folded(scale):
    *made, (keys, targets) = made_of([5] * 5)
    extra = scale * keys[:, [0, 0]], targets[:, :2]
    memory, other = filled([*made, extra]), by_solves([*made, extra])
    assert memory.num_keys == other.num_keys
    assert relative(memory.delta(), other.delta()) < 1e-15 * scale**2 + 1e-11
    kept = filled(made)
    before = kept.snapshot()
    kept.append(*extra)
    kept.restore(before)
    for _ in range(3):
        kept.append(keys, targets)
    assert relative(kept.delta().cpu(), exact_delta([*made, *[(keys, targets)] * 3])) < 1e-11


def test_removed_folded_and_loaded_in_between(replays):
    made = made_of([6] * 16)
    memory = filled(made[:5])
    memory.remove(2)
    for batch in made[5:9]:
        memory.append(*batch)
    memory.fold(12)
    for batch in made[9:13]:
        memory.append(*batch)
    memory = EditMemory.from_state_dict(*memory.state_dict())
    for batch in made[13:]:
        memory.append(*batch)
    assert len(replays) == 3 + 2 + 2 + 1
    assert relative(memory.delta().cpu(), exact_delta([made[0], *made[2:]])) < 1e-11


def test_the_number_of_graphs_is_bounded(replays):
    made = made_of([1 + 5 * (i % 13) for i in range(26)])
    memory = filled(made)
    assert len(memory._space._buffers.steps) <= len({padded(k.shape[1]) for k, _ in made}) == 2
    assert relative(memory.delta().cpu(), exact_delta(made)) < 1e-10


def test_memory_goes_with_the_memory():
    made = made_of([32] * 4)
    filled(made)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        filled(made)
    assert torch.cuda.memory_allocated() - before < 2**20


def test_another_stream_and_inference_mode(replays):
    made = made_of([12] * 8)
    memory, stream = EditMemory(PRIOR.cuda(), M, max_keys=10**6), torch.cuda.Stream()
    torch.cuda.synchronize()
    for index, batch in enumerate(made):
        with torch.inference_mode(index % 2 == 0):
            if index % 3:
                with torch.cuda.stream(stream):
                    memory.append(*batch)
            else:
                memory.append(*batch)
    assert len(replays) == 6
    torch.cuda.synchronize()
    assert relative(memory.delta().cpu(), exact_delta(made)) < 1e-11


def test_another_default_device(replays):
    made = made_of([12] * 4)
    with torch.device("cuda"):
        # Asked anew: the memory of other tests is kept.
        host = captured._in_host_memory.__wrapped__(32, F64)
        memory = filled(made)
    assert host.is_pinned() and host.device.type == "cpu"
    assert len(replays) == 2
    assert relative(memory.delta().cpu(), exact_delta(made)) < 1e-11


def test_without_a_graph(monkeypatch):
    """What cannot be captured runs as it is, and says so."""

    def refuses(*arguments: object) -> None:
        raise RuntimeError("not here")

    monkeypatch.setattr(captured, "_captured", refuses)
    made = made_of([12] * 5)
    memory = EditMemory(PRIOR.cuda(), M, max_keys=10**6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in made:
            memory.append(*batch)
    [warning] = [one for one in said if "CUDA graph could not be captured" in str(one.message)]
    assert "not here" in str(warning.message) and warning.filename == __file__
    assert relative(memory.delta().cpu(), exact_delta(made)) < 1e-11
