"""How much memory there is to work in."""

from __future__ import annotations

from pathlib import Path

import torch

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
