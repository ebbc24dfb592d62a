"""The tuner of the launch policy, with a timer that is a formula; no GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from coachhook.bench.tune import MARGIN, Load, candidates, in_force, main, tune, write
from coachhook.ops.hooked_linear.policy import ENVIRONMENT_SWITCH, LaunchPolicy, Tile, policy

START = LaunchPolicy.for_arch(9, 0)
SMALL = Load(1600, 6400, 128, 512, torch.bfloat16)
LARGE = Load(4096, 14336, 128, 4096, torch.bfloat16)


@pytest.fixture(autouse=True)
def _no_switch(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_SWITCH, raising=False)


def test_fields_that_a_load_depends_on():
    assert SMALL.fields() == ("pair", "programs_per_token_tile", "min_chunk", "correct")
    assert replace(SMALL, dtype=torch.float32).fields()[::3] == ("full", "correct_full")
    dense = replace(SMALL, rank=0)
    assert dense.fields() == ("pair",)
    assert replace(dense, stored=torch.bfloat16).fields() == ("single",)
    assert replace(dense, fused=True).fields() == ("fused_pair",)
    assert replace(dense, stored=torch.bfloat16, fused=True).fields() == ("fused_single",)
    assert replace(dense, dtype=torch.float32, fused=True).fields() == ("full",)


@pytest.mark.parametrize("arch", [(8, 0), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize(
    "name",
    [
        "pair",
        "single",
        "full",
        "fused_pair",
        "fused_single",
        "correct",
        "correct_full",
        "min_chunk",
    ],
)
def test_candidates_fit_and_differ_from_what_is(arch, name):
    sizes = LaunchPolicy.for_arch(*arch)
    values = candidates(name, sizes)
    assert len(values) > 2 and getattr(sizes, name) not in values
    assert len(set(values)) == len(values)
    for value in values:
        if isinstance(value, Tile):
            rows = 2 if name.endswith("single") else 4
            rows += 2 * name.startswith("fused")
            step = value.depth * (2 * value.tokens + rows * value.width)
            assert step * value.stages <= sizes.shared_memory
        replace(sizes, **{name: value})


def test_every_field_is_improved_in_turn():
    asked = []

    def measure(sizes: LaunchPolicy, load: Load) -> float:
        asked.append((sizes, load))
        good = (sizes.pair.warps == 4) + (sizes.min_chunk == 128) + (sizes.correct.tokens == 64)
        return load.tokens * (1.0 - 0.2 * good) * (1 + 0.01 * (sizes.pair.stages == 3))

    found = tune([SMALL, LARGE], START, measure)
    assert (found.pair.warps, found.min_chunk, found.correct.tokens) == (4, 128, 64)
    assert found.pair.stages != 3
    assert found.programs_per_token_tile == START.programs_per_token_tile
    assert (found.full, found.single, found.correct_full) == (
        START.full,
        START.single,
        START.correct_full,
    )
    assert {load for _, load in asked} == {SMALL, LARGE}
    # A field is tried on top of what was found for the ones before it.
    assert all(s.pair.warps == 4 for s, _ in asked if s.min_chunk != START.min_chunk)


def test_what_is_within_the_noise_stays():
    def measure(sizes: LaunchPolicy, load: Load) -> float:
        return 1.0 if sizes == START else 1.0 - 0.9 * MARGIN

    assert tune([SMALL], START, measure) == START


def test_loads_weigh_the_same_whatever_they_take():
    """Twice as fast for a short load and a quarter slower for a long one is a gain."""

    def measure(sizes: LaunchPolicy, load: Load) -> float:
        other = sizes.pair.tokens == 64
        if load == SMALL:
            return 0.5 if other else 1.0
        return 1250.0 if other else 1000.0

    assert tune([SMALL, LARGE], START, measure).pair.tokens == 64


def test_candidates_that_do_not_run_are_passed_over():
    def measure(sizes: LaunchPolicy, load: Load) -> float:
        if sizes.pair.depth == 64:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 / sizes.pair.width

    found = tune(
        [SMALL],
        START,
        measure,
        choices=lambda name, sizes: [value for value in candidates(name, sizes) if name == "pair"],
    )
    assert found.pair.depth != 64 and found.pair.width == 128


def test_the_file_is_what_the_policy_reads(tmp_path, monkeypatch):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({"sm_80": {"group": 4}}))
    found = replace(START, pair=Tile(64, 128, 32, warps=8, stages=3), min_chunk=256)
    write(path, found)
    table = json.loads(path.read_text())
    assert set(table) == {"sm_80", "sm_90"} and set(table["sm_90"]) == {"pair", "min_chunk"}
    monkeypatch.setenv(ENVIRONMENT_SWITCH, str(path))
    assert policy("cpu") == found
    with in_force(START):
        assert policy("cpu") == START
    assert policy("cpu") == found


def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["--out", str(tmp_path / "sizes.json")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
