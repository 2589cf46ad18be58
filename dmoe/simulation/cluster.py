"""Cluster files: the numbers of a machine that a plan depends on, each with its source.

    devices: {value: 8, source: "..."}

A file of your own, or the name of one that dmoe has (`clusters/`).
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dmoe.config.errors import ConfigError
from dmoe.config.yaml_guard import read_text

FOLDER = Path(__file__).parent / "clusters"


@dataclass(frozen=True)
class Cluster:
    """A kind of node, and the links inside and between nodes. Seconds, bytes, FLOP/s."""

    name: str
    device: str
    """cuda or cpu."""
    devices: int
    """Ranks per node: GPUs, or cores."""
    memory: float
    """Bytes per device; of a CPU, of the whole node."""
    reserved: float
    """Bytes per device that are no tensor: context, libraries, communicators, fragments."""
    flops_bf16: float
    flops_fp32: float
    gemm: float
    """Share of the FLOP/s that a large matrix product reaches."""
    grouped_gemm: float
    """The same of the grouped product over experts."""
    attention_forward: float
    attention_backward: float
    bandwidth: float
    """Memory: bytes per second of kernels that read and write it."""
    kernel_seconds: float
    """The shortest kernel: what the host needs to launch one."""
    inside_bandwidth: float
    """Bytes per second that a device sends to others of its node."""
    inside_seconds: float
    """Latency of a collective inside a node."""
    between_bandwidth: float
    """Bytes per second that a device sends to other nodes."""
    between_seconds: float
    overlap: float
    """Share of the gradient sums and gathers that can be hidden behind computation."""
    error: float
    """Relative error of a predicted step time, of which the interval is made."""
    sources: dict[str, str] = field(default_factory=dict)

    def flops(self, dtype: str) -> float:
        """Return the peak FLOP/s of matrix products in `dtype`."""
        return self.flops_bf16 if dtype in ("bfloat16", "float16") else self.flops_fp32


def shipped() -> list[str]:
    """List the names of the cluster files that dmoe has."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """Read a cluster file, or a shipped one by its name.

    Raises:
        ConfigError: no such file, or a number that is missing, unknown, or without a source.
    """
    path = Path(name)
    if not path.is_file():
        path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        allowed = f"is neither a file nor one of {', '.join(shipped())}"
        raise ConfigError("--cluster", name, allowed, "name one, or write one")
    try:
        content = yaml.safe_load(read_text(str(path)))
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise ConfigError("--cluster", name, f"is no YAML: {first}", "copy a shipped one") from None
    return parse(content, name)


def parse(content: Any, name: str) -> Cluster:
    """Make a cluster of the mapping in a file. Raises ConfigError."""
    if not isinstance(content, dict):
        raise ConfigError("--cluster", name, "must be a mapping", "copy a shipped one")
    numbers = {f.name for f in fields(Cluster) if f.type in ("int", "float")}
    required = {f.name for f in fields(Cluster) if f.default is f.default_factory is MISSING}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, entry in content.items():
        if key in ("name", "device"):
            values[key] = entry
        elif key in numbers:
            values[key], sources[key] = _number(name, key, entry)
        else:
            allowed = f"has {key!r}, which is none of {', '.join(sorted(required))}"
            raise ConfigError("--cluster", name, allowed, "correct the name")
    missing = sorted(required - values.keys())
    if missing:
        raise ConfigError("--cluster", name, f"lacks {', '.join(missing)}", "copy a shipped one")
    if values["device"] not in ("cuda", "cpu"):
        raise ConfigError("--cluster", name, "device must be cuda or cpu", "set it")
    return Cluster(**values, sources=sources)


def _number(name: str, key: str, entry: Any) -> tuple[Any, str]:
    shape = isinstance(entry, dict) and entry.keys() == {"value", "source"}
    if not shape or not isinstance(entry["source"], str) or not entry["source"].strip():
        allowed = f"{key} must be {{value: NUMBER, source: TEXT}}"
        raise ConfigError("--cluster", name, allowed, "say where the number is from")
    value = entry["value"]
    if isinstance(value, str):  # YAML 1.1 reads 9.89e14 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0:
        allowed = f"{key} must be a number, 0 or more, and is {entry['value']!r}"
        raise ConfigError("--cluster", name, allowed, "correct it")
    return (int(value) if key == "devices" else float(value)), entry["source"]
