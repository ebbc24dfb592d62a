"""Hooks on the down-projections of a model: storage, gate state, attaching and detaching."""

from __future__ import annotations

from coachhook.hooks.hook_set import HookSet, attach_hooks, attached_hooks
from coachhook.hooks.layer import HookedLinear, HookSnapshot

__all__ = ["HookSet", "HookSnapshot", "HookedLinear", "attach_hooks", "attached_hooks"]
