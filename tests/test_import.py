"""Importing has no side effects, and imports go down the floors of the house only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["coachhook", "coachhook.ops", "coachhook.cli"]

# What is imported is told after each module, in the order in which one needs the other.
_PROBE = """
import importlib, json, sys
import torch

def settings():
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default_dtype": str(torch.get_default_dtype()),
    }

before, bare = set(sys.modules), settings()
states = {}
for module in sys.argv[1:]:
    importlib.import_module(module)
    new = sorted(set(sys.modules) - before)
    states[module] = settings() | {"new": new, "cuda": torch.cuda.is_initialized()}
print(json.dumps({"bare": bare, "states": states}))
"""


@pytest.fixture(scope="module")
def probed() -> dict[str, dict]:
    """Torch as it is before anything of the package is imported, and after each import."""
    result = subprocess.run(
        [sys.executable, "-c", _PROBE, *MODULES],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("module", MODULES)
def test_import_starts_nothing(probed: dict[str, dict], module: str) -> None:
    state = probed["states"][module]
    assert state["cuda"] is False
    new = {name.partition(".")[0] for name in state["new"]}
    assert not new & {"triton", "transformers", "matplotlib", "peft", "safetensors"}
    assert "coachhook._C" not in state["new"]


@pytest.mark.parametrize("module", MODULES)
def test_import_changes_no_setting_of_torch(probed: dict[str, dict], module: str) -> None:
    state, bare = probed["states"][module], probed["bare"]
    assert len(bare) == 3 and {setting: state[setting] for setting in bare} == bare


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
