"""Importing has no side effects, and imports go down the floors of the house only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

_PROBE = """
import json, sys
import torch
before = set(sys.modules)
import {module}
print(json.dumps({{
    "new": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "threads": torch.get_num_threads(),
    "deterministic": torch.are_deterministic_algorithms_enabled(),
    "default_dtype": str(torch.get_default_dtype()),
}}))
"""


def probe(module: str) -> dict[str, object]:
    result = subprocess.run(
        [sys.executable, "-c", _PROBE.format(module=module)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("module", ["coachhook", "coachhook.ops", "coachhook.cli"])
def test_import_starts_nothing(module: str) -> None:
    state = probe(module)
    assert state["cuda"] is False
    new = {name.partition(".")[0] for name in state["new"]}
    assert not new & {"triton", "transformers", "matplotlib", "peft", "safetensors"}
    assert "coachhook._C" not in state["new"]


def test_import_changes_no_setting_of_torch() -> None:
    state, bare = probe("coachhook.ops"), probe("json")
    for setting in ("threads", "deterministic", "default_dtype"):
        assert state[setting] == bare[setting]


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_repository

    return check_repository


def test_imports_go_down_only(checker) -> None:
    assert list(checker.check_imports()) == []


def test_an_import_that_goes_up_is_found(checker, tmp_path: Path, monkeypatch) -> None:
    module = tmp_path / "coachhook" / "ops" / "bad.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "from coachhook import hooks\n"
        "from ..editing.editor import Editor\n"
        "def late():\n    import coachhook.store.files\n"
        "from coachhook.errors import FormatError\n"
        "from ._backends import resolve\n"
    )
    monkeypatch.setattr(checker, "ROOT", tmp_path)
    monkeypatch.setattr(checker, "tracked", lambda *_: [module])
    found = [line.partition("must not import ")[2] for line in checker.check_imports()]
    assert sorted(found) == ["editing", "hooks", "store"]


def test_documentation_is_whole(checker) -> None:
    problems = [*checker.check_links(), *checker.check_pages(), *checker.check_environment()]
    assert problems == []
