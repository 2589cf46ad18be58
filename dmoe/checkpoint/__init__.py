"""Checkpoints: no pickle, checksummed, atomic, loadable at any world size and EP size."""

from dmoe.checkpoint.async_saver import AsyncSaver, SavedCheckpoint
from dmoe.checkpoint.directory import latest, list_steps, prune
from dmoe.checkpoint.manifest import Manifest, verify
from dmoe.checkpoint.save_load import find_latest, load, read_manifest, save

__all__ = [
    "AsyncSaver",
    "Manifest",
    "SavedCheckpoint",
    "find_latest",
    "latest",
    "list_steps",
    "load",
    "prune",
    "read_manifest",
    "save",
    "verify",
]
