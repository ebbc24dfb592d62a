"""Floor 4: edits in forms that other software loads."""

from __future__ import annotations

from coachhook.integrations.export import FORMATS, Export, export_edits

__all__ = ["FORMATS", "Export", "export_edits"]
