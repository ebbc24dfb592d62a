from __future__ import annotations

import pytest
import torch

from coachhook.errors import FormatError
from coachhook.store import folder_sizes, save_folder


def test_bytes_by_group_and_in_all(tmp_path):
    tensors = {
        "layer.0.memory.factor": torch.zeros(10, dtype=torch.float64),
        "layer.11.memory.factor": torch.zeros(21, dtype=torch.float64),
        "layer.0.memory.folded.3.keys": torch.zeros(2, 5),
        "layer.0.sample": torch.zeros(3, 4, dtype=torch.bfloat16),
        "layer.2.sample": torch.zeros(3, 4),
        "targets.1": torch.zeros(0, 4, dtype=torch.float64),
        "flags": torch.zeros(7, dtype=torch.bool),
    }
    stable = ["layer.0.memory.factor"]
    save_folder(tmp_path / "x", kind="edits", manifest={}, tensors=tensors, stable=stable)
    (tmp_path / "x" / "notes.txt").write_text("mine")
    sizes = folder_sizes(tmp_path / "x", "edits")
    assert [(g.name, g.dtype, g.tensors, g.bytes) for g in sizes.groups] == [
        ("memory.factor", "float64", 2, 31 * 8),
        ("sample", "float32", 1, 48),
        ("memory.folded.keys", "float32", 1, 40),
        ("sample", "bfloat16", 1, 24),
        ("flags", "bool", 1, 7),
        ("targets", "float64", 1, 0),
    ]
    ours = [p for p in (tmp_path / "x").iterdir() if p.name != "notes.txt"]
    assert sizes.total == sum(p.stat().st_size for p in ours)


def test_another_kind_is_refused(tmp_path):
    save_folder(tmp_path / "x", kind="edits", manifest={}, tensors={})
    with pytest.raises(FormatError, match="must hold coachhook statistics"):
        folder_sizes(tmp_path / "x", "statistics")
