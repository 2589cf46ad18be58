"""Cluster files: the numbers of a machine that a plan depends on, each with its source.

    devices: {value: 8, source: "..."}

A file of your own, or the name of one that dmoe has (`clusters/`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dmoe.config.errors import ConfigError
from dmoe.config.yaml_guard import read_text
from dmoe.simulation.measured import Measured, from_plain

FOLDER = Path(__file__).parent / "clusters"
PARTS_OF_1 = (
    *("gemm", "grouped_gemm", "attention_forward", "attention_backward", "overlap", "error"),
)
MAY_BE_0 = (
    *("reserved", "kernel_seconds", "inside_seconds", "between_seconds", "overlap", "error"),
)


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
    """Relative error of a predicted step time, of which the interval is made. Of a calibrated file
    the largest of `residuals`."""
    host_bandwidth: float = 25e9
    """Bytes per second between a device and the memory of its host, in one direction. Default: what
    PCIe 4.0 x16 reaches (ZaidQureshi/bam issue 54, of a paper's author: the measured peak)."""
    residuals: tuple[float, ...] = ()
    """Measured over predicted time, minus 1, of configs that had no part in the tables."""
    measured: tuple[Measured, ...] = ()
    """Times of kernels and collectives, by the number of ranks: then they are used, and neither the
    peaks nor the shares."""
    sources: dict[str, str] = field(default_factory=dict)

    def flops(self, dtype: str) -> float:
        """Return the peak FLOP/s of matrix products in `dtype`."""
        return self.flops_bf16 if dtype in ("bfloat16", "float16") else self.flops_fp32


def usable_memory(cluster: Cluster, world: int) -> float:
    """Return the bytes that the tensors of one rank may take; ranks of a CPU share its memory."""
    if cluster.device == "cuda":
        return cluster.memory - cluster.reserved
    return cluster.memory / min(world, max(world, cluster.devices)) - cluster.reserved


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
        text = read_text(str(path))
        content = yaml.safe_load(text)
    except ConfigError as error:
        raise error.renamed({"CONFIG": "--cluster"}) from None
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise ConfigError("--cluster", name, f"is no YAML: {first}", "copy a shipped one") from None
    keys = Counter(re.findall(r"^(\w+):", text, re.M))
    if twice := [key for key, times in keys.items() if times > 1]:  # YAML takes the last
        raise ConfigError("--cluster", name, f"has {twice[0]!r} twice", "remove one of them")
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
        elif key in TABLES:
            values[key], sources[key] = _table(name, key, entry)
        else:
            known = {"name", "device"} | numbers | TABLES.keys()
            allowed = f"has {key!r}, which is none of {', '.join(sorted(known))}"
            raise ConfigError("--cluster", name, allowed, "correct the name")
    if residuals := values.get("residuals"):
        values["error"] = max(map(abs, residuals))
    missing = sorted(required - values.keys())
    if missing:
        raise ConfigError("--cluster", name, f"lacks {', '.join(missing)}", "copy a shipped one")
    if not isinstance(values["name"], str) or not values["name"].isprintable():
        raise ConfigError("--cluster", name, "its name must be text on one line", "write one")
    if values["device"] not in ("cuda", "cpu"):
        raise ConfigError("--cluster", name, "device must be cuda or cpu", "set it")
    for key in sorted(values.keys() & numbers):
        if allowed := _problem(key, values):
            raise ConfigError("--cluster", name, f"{allowed}, and is {values[key]:g}", "correct it")
    return Cluster(**values, sources=sources)


def _problem(key: str, values: dict[str, Any]) -> str:
    """Return what a number must be if it is one that no machine has; else an empty text.

    A file that was calibrated for one rank has links of bandwidth 0: there was none to measure.
    """
    value, unmeasured = values[key], key.endswith("_bandwidth") and values.get("measured")
    if value < 0 or (value == 0 and key not in MAY_BE_0 and not unmeasured):
        return f"{key} must be {'0 or more' if key in MAY_BE_0 else 'above 0'}"
    if value > 1 and key in PARTS_OF_1 and not (key == "error" and values.get("residuals")):
        return f"{key} is a share and must be at most 1"
    if key == "devices" and value != int(value):
        return "devices must be a whole number"
    if key == "reserved" and value >= values["memory"]:
        return f"reserved must leave something of the memory of {values['memory']:g} bytes"
    return ""


def _sourced(name: str, key: str, entry: Any) -> tuple[Any, str]:
    shape = isinstance(entry, dict) and entry.keys() == {"value", "source"}
    if not shape or not isinstance(entry["source"], str) or not entry["source"].strip():
        allowed = f"{key} must be {{value: NUMBER, source: TEXT}}"
        raise ConfigError("--cluster", name, allowed, "say where the number is from")
    return entry["value"], entry["source"]


def _table(name: str, key: str, entry: Any) -> tuple[Any, str]:
    value, source = _sourced(name, key, entry)
    try:
        return TABLES[key](value), source
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        allowed = f"{key} is no table of measured times: {error}"
        fix = "write it anew with dmoe plan --calibrate"
        raise ConfigError("--cluster", name, allowed, fix) from None


def _residuals(value: Any) -> tuple[float, ...]:
    residuals = tuple(map(float, value))
    if not residuals or not all(math.isfinite(r) and r > -1 for r in residuals):
        raise ValueError("residuals must be numbers above -1")
    return residuals


TABLES: dict[str, Callable[[Any], Any]] = {
    "residuals": _residuals,
    "measured": lambda value: tuple(from_plain(value)),
}


def _number(name: str, key: str, entry: Any) -> tuple[Any, str]:
    value, source = _sourced(name, key, entry)
    if isinstance(value, str):  # YAML 1.1 reads 9.89e14 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value):
        allowed = f"{key} must be a number, and is {entry['value']!r}"
        raise ConfigError("--cluster", name, allowed, "correct it")
    return (int(value) if value == int(value) and key == "devices" else float(value)), source
