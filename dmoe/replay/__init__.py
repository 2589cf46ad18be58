"""Choices of experts in files: written by a run, or by an inference engine, and read by a run.

part.py     one file: safetensors with its SHA-256, written atomically; what the choices belong to
writer.py   the parts of a run that records
reader.py   a recorded directory, or a .npy or .safetensors file [tokens, layers, K]
"""

from __future__ import annotations

from dmoe.replay.part import ChoiceSpec, read_choices, write_choices
from dmoe.replay.reader import ChoiceReader
from dmoe.replay.writer import ChoiceWriter

__all__ = ["ChoiceReader", "ChoiceSpec", "ChoiceWriter", "read_choices", "write_choices"]
