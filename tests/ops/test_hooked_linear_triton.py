"""The Triton backend without a GPU: its kernels in the interpreter, and its launch policy."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from importlib.metadata import version
from pathlib import Path

import pytest

from coachhook.ops.hooked_linear import policy as launch
from coachhook.ops.hooked_linear.policy import LaunchPolicy, Tile, policy

ARCHS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
CASES = [Path(__file__).with_name(name) for name in ("triton_cases.py", "triton_cue_cases.py")]


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.timeout(900)
def test_kernels_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    triton, numpy = (_release(version(name)) for name in ("triton", "numpy"))
    if triton < (3, 9) and numpy >= (2, 4):
        pytest.skip("the interpreter of triton < 3.9 needs numpy < 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    environment.pop(launch.ENVIRONMENT_SWITCH, None)
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, CASES)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=CASES[0].parents[2],
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize("arch", ARCHS)
def test_sizes_fit_the_architecture(arch) -> None:
    sizes = LaunchPolicy.for_arch(*arch)
    for kind, x_bytes, s_bytes in (("pair", 2, 4), ("single", 2, 2), ("full", 4, 4)):
        for features in (1, 64, 65, 4096):
            tile = sizes.project(kind, features)
            step = tile.depth * (tile.tokens * x_bytes + tile.width * s_bytes)
            assert step * tile.stages <= sizes.shared_memory
            for depth in (1, 37, 6400, 14336, 28672):
                chunk = sizes.chunk(tile, features, depth)
                assert chunk % tile.depth == 0
                splits = -(-depth // chunk)
                assert (splits - 1) * chunk < depth  # none is empty
                assert splits <= sizes.programs_per_token_tile
    for tile, s_bytes in ((sizes.fused_pair, 4), (sizes.fused_single, 2)):
        step = tile.depth * (tile.tokens * 2 + tile.width * (2 + s_bytes))
        assert step * tile.stages <= sizes.shared_memory


def test_unknown_newer_architectures_get_sizes_and_older_ones_are_refused() -> None:
    assert LaunchPolicy.for_arch(9, 9).shared_memory == LaunchPolicy.for_arch(9, 0).shared_memory
    assert LaunchPolicy.for_arch(13, 0).shared_memory == LaunchPolicy.for_arch(12, 1).shared_memory
    with pytest.raises(ValueError, match=r"compute capability 8\.0, got 7\.5"):
        LaunchPolicy.for_arch(7, 5)
    with pytest.raises(FrozenInstanceError):
        LaunchPolicy.for_arch(9, 0).group = 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must name a readable JSON file"),
        ("[]", "must hold an object"),
        ('{"sm_90": {"speed": 1}}', "must map sm_XY to some of pair, single"),
        ('{"sm_90": {"group": "8"}}', "group must be a positive number, got '8'"),
        ('{"sm_90": {"pair": {"tokens": 128}}}', "pair: .*missing"),
    ],
)
def test_a_bad_file_says_what_is_wrong(content, message, tmp_path, monkeypatch) -> None:
    path = tmp_path / "sizes.json"
    path.write_text(content)
    monkeypatch.setenv(launch.ENVIRONMENT_SWITCH, str(path))
    with pytest.raises(ValueError, match=message):
        policy("cpu")
    monkeypatch.setenv(launch.ENVIRONMENT_SWITCH, str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match="must name a readable JSON file"):
        policy("cpu")


def test_a_file_changes_what_it_names(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(launch.ENVIRONMENT_SWITCH, raising=False)
    before = policy("cpu")
    wide = {"tokens": 256, "width": 64, "depth": 64, "warps": 8, "stages": 2}
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({"sm_90": {"single": wide, "group": 4}, "sm_80": {"group": 1}}))
    monkeypatch.setenv(launch.ENVIRONMENT_SWITCH, str(path))
    sizes = policy("cpu")
    assert sizes.single == Tile(**wide) and sizes.group == 4
    assert sizes.pair == before.pair
    path.write_text(json.dumps({"sm_90": before.to_json()}))
    assert launch._policy.__wrapped__((9, 0), str(path)) == before


@pytest.mark.parametrize(
    "values", [{"tokens": 48}, {"depth": 8}, {"warps": 3}, {"warps": 32}, {"stages": 0}]
)
def test_tiles_are_powers_of_two(values) -> None:
    good = {"tokens": 64, "width": 64, "depth": 32, "warps": 4, "stages": 3}
    Tile(**good)
    with pytest.raises(ValueError, match=rf"{next(iter(values))}"):
        Tile(**(good | values))
