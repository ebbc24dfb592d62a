from __future__ import annotations

import pytest
import torch

from coachhook.errors import FormatError
from coachhook.store import folder_sizes, load_folder, save_folder, sizes


def test_bytes_by_group_and_in_all(tmp_path):
    tensors = {
        "layer.11.memory.factor": torch.zeros(21, dtype=torch.float64),
        "layer.0.memory.folded.3.keys": torch.zeros(2, 5),
        "layer.0.sample": torch.zeros(3, 4, dtype=torch.bfloat16),
        "layer.2.sample": torch.zeros(3, 4),
        "targets.1": torch.zeros(0, 4, dtype=torch.float64),
        "flags": torch.zeros(7, dtype=torch.bool),
    }
    apart = [{"layer.0.memory.factor": torch.zeros(10, dtype=torch.float64)}]
    save_folder(tmp_path / "x", kind="edits", manifest={}, tensors=tensors, sets=apart)
    (tmp_path / "x" / "notes.txt").write_text("mine")
    found = folder_sizes(tmp_path / "x", "edits")
    assert [(g.name, g.dtype, g.tensors, g.bytes) for g in found.groups] == [
        ("memory.factor", "float64", 2, 31 * 8),
        ("sample", "float32", 1, 48),
        ("memory.folded.keys", "float32", 1, 40),
        ("sample", "bfloat16", 1, 24),
        ("flags", "bool", 1, 7),
        ("targets", "float64", 1, 0),
    ]
    ours = [p for p in (tmp_path / "x").iterdir() if p.name != "notes.txt"]
    assert found.total == sum(p.stat().st_size for p in ours)


def test_another_kind_is_refused(tmp_path):
    save_folder(tmp_path / "x", kind="edits", manifest={}, tensors={})
    with pytest.raises(FormatError, match="must hold coachhook statistics"):
        folder_sizes(tmp_path / "x", "statistics")


def test_a_folder_that_is_replaced_meanwhile_is_measured_as_it_was(tmp_path, monkeypatch):
    def save(**tensors):
        save_folder(
            tmp_path / "x",
            kind="edits",
            manifest={},
            tensors={},
            sets=[{k: v} for k, v in tensors.items()],
        )

    def then_replaced(path, kind):
        found = load_folder(path, kind)
        save(b=torch.ones(3))
        return found

    save(a=torch.ones(5), b=torch.ones(4))
    monkeypatch.setattr(sizes, "load_folder", then_replaced)
    found = folder_sizes(tmp_path / "x", "edits")
    assert [(group.name, group.bytes) for group in found.groups] == [("a", 20), ("b", 16)]
