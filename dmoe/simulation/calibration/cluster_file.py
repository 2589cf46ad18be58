"""Write what `dmoe plan --calibrate` has measured as a cluster file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import main_memory
from dmoe.data.prepare.part_file import write_file
from dmoe.simulation.calibration.calibrate import Calibration
from dmoe.simulation.cluster import parse
from dmoe.simulation.measured import read

DIGITS = 3
LARGE = 1 << 20
"""Bytes of a collective for the bandwidth of a link."""


def check_target(path: Path) -> None:
    """Refuse before the measurement what could not be written after it. Raises ConfigError."""
    if path.is_dir() or not path.parent.is_dir():
        allowed = "must be a file in an existing directory"
        raise ConfigError("--to", str(path), allowed, "use --to laptop.yaml")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError("--to", str(path), "cannot be written", "name another file")


def write(found: Calibration, path: Path, about: dict[str, Any]) -> None:
    """Write the file, whole or not at all, if it reads back."""
    text = to_text(found, about)
    import yaml

    parse(yaml.safe_load(text), str(path))
    write_file(path, text.encode())


def to_text(found: Calibration, about: dict[str, Any]) -> str:
    """Return the YAML of a cluster file; `about` is the machine, of `dmoe.bench.measure`."""
    cores = len(os.sched_getaffinity(0))
    units = ", ".join(about["features"]) or "no wide vector units"
    name = f"{cores} cores of {about['processor']} ({units})"
    source = f"measured on {date.today().isoformat()} by `dmoe plan --calibrate`"
    lines = [
        f"# {name}, torch {about['torch']}. Tables: dmoe/simulation/measured.py.",
        f"name: {json.dumps(name)}",
        "device: cpu",
    ]
    for key, (value, extra) in _numbers(found, cores).items():
        text = json.dumps(f"{source}{extra}")
        lines.append(f"{key}: {{value: {_rounded(value)}, source: {text}}}")
    lines.append(
        f"residuals: {{value: {json.dumps([round(r, 3) for r in found.residuals])}, "
        f"source: {json.dumps(source + ': steps of models that had no part in the tables')}}}"
    )
    lines += ["measured:", f"  source: {json.dumps(source)}", "  value:"]
    for table in found.tables:
        content = asdict(table)
        lines.append(f"  - ranks: {content.pop('ranks')}")
        for key, value in content.items():
            if isinstance(value, dict) and value:
                lines.append(f"    {key}:")
                lines += [f"      {name}: {_flow(each)}" for name, each in value.items()]
            else:
                lines.append(f"    {key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _numbers(found: Calibration, cores: int) -> dict[str, tuple[float, str]]:
    """Return the numbers that every cluster file has, and what is said of each."""
    links = [table for table in found.tables if table.collectives]
    latency = bandwidth = 0.0
    if links:
        curve = links[0].collectives["all_to_all"]
        latency = curve[0][1]
        bandwidth = LARGE / max(1e-9, read(curve, LARGE) - latency)
    one_host = ": one host; that of its ranks"
    tables = ": the tables of products and kernels have it, so no share is applied"
    return {
        "devices": (cores, ": cores"),
        "memory": (main_memory() or 0, ""),
        "reserved": (found.resident, ": a process without its model"),
        "flops_bf16": (found.flops.get("bfloat16", found.flops["float32"]), ": one core"),
        "flops_fp32": (found.flops["float32"], ": one core"),
        **dict.fromkeys(
            ("gemm", "grouped_gemm", "attention_forward", "attention_backward"), (1.0, tables)
        ),
        "bandwidth": (found.bandwidth, ": the largest product of two tensors by elements"),
        "kernel_seconds": (found.tables[0].host_seconds, ": between two kernels"),
        "inside_bandwidth": (bandwidth, ": all-to-all of 1 MiB"),
        "inside_seconds": (latency, ": all-to-all of a few bytes"),
        "between_bandwidth": (bandwidth, one_host),
        "between_seconds": (latency, one_host),
        "overlap": (0.0, ": not measured; gloo sums on the cores that compute"),
    }


def _rounded(value: float) -> str:
    """Return a number with three digits, as YAML 1.1 reads it: an exponent needs a point."""
    if value == int(value) and abs(value) < 10**6:
        return str(int(value))
    return f"{value:.{DIGITS - 1}e}"


def _flow(value: Any) -> str:
    """Return a value on one line of YAML, numbers with three digits."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(each) for each in value) + "]"
    return _rounded(value)
