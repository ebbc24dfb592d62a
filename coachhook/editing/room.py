"""How much memory there is to work in, and which requests it has room for at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from coachhook.editing.encoding import EncodedRequest
from coachhook.editing.prompts import EncodedPrompt

# Where the system does not say how much memory there is.
_TOKENS_AT_ONCE = 16384
# Where a control group limits a container, as files of (limit, used).
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def free_memory(device: torch.device, root: str = "/") -> int | None:
    """Bytes that could be allocated on a device now; None where the system does not say.

    Args:
        device: CUDA devices are asked; for the CPU it is what Linux holds available, or what is
            left of a container's limit.
        root: of the file system that describes the machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the caching allocator holds without using it can be had too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path(root, "proc/meminfo").read_text().splitlines()
        found += [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        return None
    for limit, used in _CGROUPS:
        try:
            numbers = [int(Path(root, f.lstrip("/")).read_text()) for f in (limit, used)]
        except (OSError, ValueError):  # no such file, or "max"
            continue
        found.append(max(numbers[0] - numbers[1], 0))
    return min(found, default=None)


def tokens_at_once(device: torch.device, bytes_per_token: int) -> int:
    """So many tokens of so many bytes take half of the free memory."""
    room = free_memory(device)
    return _TOKENS_AT_ONCE if room is None else room // 2 // max(bytes_per_token, 1)


def chunks(
    encoded: Sequence[EncodedRequest],
    ties: Sequence[int],
    most: int,
    kept: float | None,
    *,
    among: Sequence[int],
) -> list[list[int]]:
    """Requests to be run at once, tied ones together.

    Args:
        encoded: the k requests.
        ties: a number for each; those with the same are tied.
        most: padded tokens differentiated at once, unless a single bundle has more.
        kept: what any token takes beside those from the first that may change on, which are
            differentiated: a share of what these do. None: all are differentiated.
        among: numbers of the requests in question.
    """
    bundles: dict[int, list[int]] = {}
    for i in among:
        bundles.setdefault(ties[i], []).append(i)
    found: list[list[int]] = []
    size = (0, 0, 0)
    for bundle in bundles.values():
        # Every request of a chunk takes as many rows as the one with the most prompts, and every
        # row as many tokens as the longest.
        rows, width, live = map(max, zip(size, *(_size(encoded[i]) for i in bundle), strict=True))
        count = len(found[-1]) + len(bundle) if found else 0
        tokens = width if kept is None else live + kept * width
        if not found or count * rows * tokens > most:
            found.append([])
            rows, width, live = map(max, zip(*(_size(encoded[i]) for i in bundle), strict=True))
        found[-1] += bundle
        size = rows, width, live
    return found


def _size(request: EncodedRequest) -> tuple[int, int, int]:
    """Rows, most tokens of one, and most from the first that may change on."""
    rows: list[tuple[EncodedPrompt, Sequence[int]]] = [(p, request.target) for p in request.prompts]
    rows.append((request.essence, ()))
    lengths = [len(prompt.ids) + len(target) for prompt, target in rows]
    first = [max(prompt.first, prompt.lookup - 1) for prompt, _ in rows]
    return len(rows), max(lengths), max(a - b for a, b in zip(lengths, first, strict=True))
