"""Checkpoints that cannot be half right: no pickle, checksummed, atomic, loadable at any world and EP size."""

from dmoe.distributed.checkpoint.layout import latest, list_steps, prune
from dmoe.distributed.checkpoint.manifest import Manifest, verify
from dmoe.distributed.checkpoint.saver import Saved, AsyncSaver
from dmoe.distributed.checkpoint.store import find_latest, load, read_manifest, save

__all__ = ["Manifest", "Saved", "AsyncSaver", "find_latest", "latest", "list_steps", "load", "read_manifest", "prune", "save", "verify"]
