"""Floor 3: from requests to hooks."""

from __future__ import annotations

from coachhook.editing.attach import Handle, attach
from coachhook.editing.config import EditConfig
from coachhook.editing.editor import Editor
from coachhook.editing.folder import load_state, revert_folder, save_state
from coachhook.editing.memory import EditMemory
from coachhook.editing.requests import EditRequest
from coachhook.editing.result import EditResult

__all__ = [
    "EditConfig",
    "EditMemory",
    "EditRequest",
    "EditResult",
    "Editor",
    "Handle",
    "attach",
    "load_state",
    "revert_folder",
    "save_state",
]
