"""What the package writes to disk: folders of safetensors files with a JSON manifest.

A folder is written beside its final place and renamed into it, so that a reader finds the old
one or the new one, whole. Nothing is pickled.
"""

from __future__ import annotations

from coachhook.store.files import (
    TensorSource,
    check_fields,
    folder_kind,
    load_folder,
    read_manifest,
    save_folder,
    version_of,
)
from coachhook.store.fingerprint import fingerprint
from coachhook.store.folders import check_writable, write_folder_atomically
from coachhook.store.sizes import FolderSizes, folder_sizes

__all__ = [
    "FolderSizes",
    "TensorSource",
    "check_fields",
    "check_writable",
    "fingerprint",
    "folder_kind",
    "folder_sizes",
    "load_folder",
    "read_manifest",
    "save_folder",
    "version_of",
    "write_folder_atomically",
]
