"""Launch policy of the Triton kernels: tile sizes by architecture, dtype and size of the hook.

Nothing here depends on the number of tokens, so that the order of a token's sums, and with it its
decision, is the same in every batch. Nothing is tuned in a user's job: sizes come from
:meth:`LaunchPolicy.for_arch`, or from the JSON file that ``COACHHOOK_LAUNCH_POLICY`` names.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT_SWITCH = "COACHHOOK_LAUNCH_POLICY"

# Oldest architecture with bfloat16 and asynchronous copies.
MIN_CAPABILITY = (8, 0)

_KIB = 1024
# Dynamic shared memory one block may use: CUDA C++ Programming Guide, compute capabilities.
_SHARED_MEMORY = {
    (8, 0): 163 * _KIB,
    (8, 6): 99 * _KIB,
    (8, 7): 163 * _KIB,
    (8, 9): 99 * _KIB,
    (9, 0): 227 * _KIB,
    (10, 0): 227 * _KIB,
    (10, 3): 227 * _KIB,
    (11, 0): 227 * _KIB,
    (12, 0): 99 * _KIB,
    (12, 1): 99 * _KIB,
}


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its problem; every number is a power of two.

    Attributes:
        tokens: tokens per program.
        width: features (projection) or outputs (correction) per program.
        depth: terms of the sum per step.
        warps: warps per program.
        stages: steps whose loads are in flight.
    """

    tokens: int
    width: int
    depth: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            power = isinstance(value, int) and value > 0 and value & (value - 1) == 0
            if field.name != "stages" and not power:
                raise ValueError(f"Tile: {field.name} must be a power of two, got {value!r}")
        if not isinstance(self.stages, int) or not 1 <= self.stages <= 8:
            raise ValueError(f"Tile: stages must be in 1..8, got {self.stages!r}")
        if min(self.tokens, self.width, self.depth) < 16:
            raise ValueError("Tile: tokens, width and depth must be at least 16")
        if self.warps > 16:
            raise ValueError(f"Tile: warps must be at most 16, got {self.warps}")


@dataclass(frozen=True)
class LaunchPolicy:
    """Sizes of every launch on one architecture.

    Attributes:
        arch: compute capability.
        shared_memory: bytes one block may use.
        pair: projection of 16-bit tokens with a hook stored in more digits (two products).
        single: projection of 16-bit tokens with a hook in their own dtype.
        full: projection of float32 tokens, in float32.
        fused_pair: ``pair``, of a dense hook, together with the frozen product.
        fused_single: ``single``, of a dense hook, together with the frozen product.
        correct: correction of 16-bit outputs (tensor cores, three products of TF32 halves).
        correct_full: correction of float32 outputs, in float32.
        group: tiles of tokens that are worked on together, for the L2 cache.
        programs_per_token_tile: wanted number of programs per tile of tokens; where the features
            do not give them, the sum over n is cut.
        min_chunk: shortest piece of the sum over n that is worth a program.
    """

    arch: tuple[int, int]
    shared_memory: int
    pair: Tile
    single: Tile
    full: Tile
    fused_pair: Tile
    fused_single: Tile
    correct: Tile
    correct_full: Tile
    group: int = 8
    programs_per_token_tile: int = 16
    min_chunk: int = 512

    @staticmethod
    def for_arch(major: int, minor: int) -> LaunchPolicy:
        """Heuristic for a compute capability; an unknown newer one gets its family's sizes.

        Raises:
            ValueError: older than 8.0.
        """
        arch = (major, minor)
        if arch < MIN_CAPABILITY:
            raise ValueError(
                f"LaunchPolicy: the Triton kernels need compute capability 8.0, got {major}.{minor}"
            )
        family = max(known for known in _SHARED_MEMORY if known <= arch)
        shared_memory = _SHARED_MEMORY[family]
        # Sizes keep registers to spare: what one release of Triton fits, the next one may spill.
        full = Tile(64, 64, 16, warps=8, stages=4)
        correct_full = Tile(32, 64, 32, warps=4, stages=3)
        if major in (9, 10, 11):
            # Warp-group products need 64 features per group of four warps. Swept on an H200.
            return LaunchPolicy(
                arch,
                shared_memory,
                pair=Tile(128, 64, 32, warps=4, stages=6),
                single=Tile(128, 128, 64, warps=8, stages=3),
                full=full,
                fused_pair=Tile(128, 64, 32, warps=8, stages=4),
                fused_single=Tile(128, 128, 64, warps=8, stages=3),
                correct=Tile(32, 128, 32, warps=4, stages=2),
                correct_full=correct_full,
            )
        return LaunchPolicy(
            arch,
            shared_memory,
            pair=Tile(64, 128, 32, warps=8, stages=4),
            single=Tile(64, 128, 64, warps=8, stages=3),
            full=full,
            fused_pair=Tile(64, 64, 32, warps=8, stages=3),
            fused_single=Tile(128, 64, 32, warps=8, stages=4),
            correct=Tile(32, 64, 32, warps=8, stages=3),
            correct_full=correct_full,
        )

    def project(self, kind: str, features: int) -> Tile:
        """Tile of the projection; ``kind`` is the name of its field, such as ``"pair"``."""
        tile: Tile = getattr(self, kind)
        return replace(tile, width=min(tile.width, 64)) if features <= 64 else tile

    def chunk(self, tile: Tile, features: int, depth: int) -> int:
        """Length of the pieces of the sum over n, a multiple of the tile's depth."""
        tiles = -(-features // tile.width)
        splits = max(1, min(self.programs_per_token_tile // tiles, depth // self.min_chunk))
        steps = -(-depth // tile.depth)
        return -(-steps // splits) * tile.depth

    def to_json(self) -> dict[str, Any]:
        """The sizes as the JSON file holds them, without ``arch`` and ``shared_memory``."""
        values = asdict(self)
        del values["arch"], values["shared_memory"]
        return values


def _override(policy: LaunchPolicy, path: str, values: Any) -> LaunchPolicy:
    known = policy.to_json()
    if not isinstance(values, dict) or not values.keys() <= known.keys():
        raise ValueError(
            f"{ENVIRONMENT_SWITCH}: {path} must map sm_XY to some of {', '.join(known)}, "
            f"got {values!r}"
        )
    changed: dict[str, Any] = {}
    for name, value in values.items():
        try:
            changed[name] = Tile(**value) if isinstance(known[name], dict) else value
        except (TypeError, ValueError) as error:
            raise ValueError(f"{ENVIRONMENT_SWITCH}: {path}: {name}: {error}") from error
        if not isinstance(known[name], dict) and (
            not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0
        ):
            raise ValueError(
                f"{ENVIRONMENT_SWITCH}: {path}: {name} must be a positive number, got {value!r}"
            )
    return replace(policy, **changed)


@cache
def _policy(capability: tuple[int, int], path: str | None) -> LaunchPolicy:
    policy = LaunchPolicy.for_arch(*capability)
    if not path:
        return policy
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{ENVIRONMENT_SWITCH} must name a readable JSON file, got {path!r}: {error}"
        ) from error
    if not isinstance(table, dict):
        raise ValueError(f"{ENVIRONMENT_SWITCH}: {path} must hold an object, got {table!r}")
    return _override(policy, path, table.get(f"sm_{capability[0]}{capability[1]}", {}))


def policy(device: torch.device | str | None = None) -> LaunchPolicy:
    """The policy in force on a device (None: the current CUDA device).

    The JSON file of ``COACHHOOK_LAUNCH_POLICY`` is read once per process and path::

        {"sm_90": {"pair": {"tokens": 128, "width": 128, "depth": 64, "warps": 8, "stages": 3},
                   "programs_per_token_tile": 16}}

    A device that is not CUDA has the policy of compute capability 9.0: that of the interpreter.

    Raises:
        ValueError: older than 8.0, or a JSON file that does not fit.
    """
    where = torch.device("cuda" if device is None else device)
    capability = (9, 0)
    if where.type == "cuda":
        capability = torch.cuda.get_device_capability(where)
    return _policy(capability, os.environ.get(ENVIRONMENT_SWITCH))
