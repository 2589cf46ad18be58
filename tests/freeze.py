"""Record what a refactoring must not change, or compare a tree with what was recorded.

    python -m tests.freeze record OUT.json        # on the tree before
    python -m tests.freeze compare OUT.json       # on the tree after: exit 1 and each difference

Recorded, through the command line alone so that no rename can hide a change: the numbers of
`dmoe explain --json` for every shipped config, every number that `dmoe train` logs in the first 20
steps of five configs on 1 and 2 ranks (as `float.hex()`, times and speeds left out), the manifest
of one checkpoint, and `dmoe verify --json` of three configs. The file belongs to one machine:
another CPU rounds matrix products differently.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmoe.runs.metrics_log import read_metrics

ROOT = Path(__file__).parent.parent
SMALL = ["train.steps=20", "train.log_every=1", "train.eval_every=10", "train.eval_sequences=4"]
SHORT = ["train.global_batch=8", "data.seq_len=64", "train.precision=fp32", "tracking.trackers=[]"]
RUNS = {
    "quickstart": ["configs/quickstart.yaml"],
    "dense": ["configs/quickstart_dense.yaml"],
    "noisy_padded": [
        *("configs/quickstart.yaml", "moe.router.kind=noisy", "moe.exchange=padded"),
        *("moe.capacity.factor=1.0", "moe.capacity.group=global", "moe.capacity.priority=score"),
    ],
    "grouped_bias_next_choice": [
        *("configs/quickstart.yaml", "moe.router.kind=group_limited", "moe.router.groups=4"),
        *("moe.router.topk_groups=2", "moe.router.score=sigmoid", "moe.balance.bias=0.01"),
        *("moe.capacity.factor=1.0", "moe.capacity.overflow=next_choice", "moe.experts.shared=1"),
        *("moe.balance.switch_level=global", "moe.capacity.priority=score"),
    ],
    "mixed_budget_fsdp": [
        *("configs/quickstart.yaml", "moe.router.kind=budget", "moe.router.renormalize=false"),
        *("moe.router.budget=0.5", "moe.experts.zero=1", "moe.experts.constant=1"),
        *("parallel.mode=fsdp", "train.micro_batch=2"),
    ],
}
VERIFIED = {
    "quickstart": ["configs/quickstart.yaml"],
    "deepseek": ["configs/deepseek_moe_16b.yaml"],
    "modules": ["configs/modular/mixture_of_lora.yaml"],
}
TIME_KEYS = (
    "time",
    "second",
    "mfu",
    "memory",
    "rss",
    "flops",
    "straggler",
    "fraction",
    "share_of_time",
)


def dmoe(*arguments: str) -> str:
    """Run a command; return its output, or its exit code and errors."""
    command = [sys.executable, "-m", "dmoe", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else f"exit {done.returncode}: {done.stderr[-400:]}"


def numbers(value: Any) -> Any:
    """Return `value` with floats as hex, without sentences and times."""
    if isinstance(value, dict):
        kept = {
            k: v for k, v in value.items() if k != "words" and not any(c in k for c in TIME_KEYS)
        }
        return {key: numbers(inner) for key, inner in kept.items()}
    if isinstance(value, list):
        return [numbers(inner) for inner in value]
    return value.hex() if isinstance(value, float) else value


def parsed(text: str) -> Any:
    """Parse JSON output; an error stays text."""
    return text if text.startswith("exit ") else numbers(json.loads(text))


def record() -> dict[str, Any]:
    """Run all commands and return their outputs by name."""
    found: dict[str, Any] = {}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        name = str(path.relative_to(ROOT))
        found[f"explain {name}"] = parsed(dmoe("explain", name, "--json"))
    with tempfile.TemporaryDirectory() as scratch:
        for name, overrides in RUNS.items():
            for ranks in (1, 2):
                run = Path(scratch) / f"{name}-{ranks}"
                output = dmoe(
                    "train",
                    *overrides,
                    *SHORT,
                    *SMALL,
                    f"train.run_dir={run}",
                    "--ranks",
                    str(ranks),
                )
                found[f"train {name} on {ranks}"] = lines(run) or output
                if name == "quickstart":
                    found[f"manifest on {ranks}"] = manifest(run)
    for name, overrides in VERIFIED.items():
        found[f"verify {name}"] = parsed(dmoe("verify", *overrides, "--worlds", "1,2", "--json"))
    return found


def lines(run: Path) -> list[Any]:
    """Return the `train` and `eval` lines of a run."""
    path = run / "metrics.jsonl"
    every = read_metrics(path) if path.exists() else []
    return [numbers(line) for line in every if line["event"] in ("train", "eval")]


def manifest(run: Path) -> Any:
    """Return the manifest of the newest checkpoint."""
    path = max(run.glob("checkpoints/*/manifest.json"), default=None)
    return None if path is None else numbers(json.loads(path.read_text()))


def differences(before: Any, after: Any, where: str) -> Iterator[str]:
    """Yield a line for every differing value, with its path."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from differences(before.get(key), after.get(key), f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{where}/{index}")
    elif before != after:
        yield f"{where}: {str(before)[:200]} -> {str(after)[:200]}"


if __name__ == "__main__":
    mode, path = sys.argv[1], Path(sys.argv[2])
    now = record()
    if mode == "record":
        path.write_text(json.dumps(now, indent=1))
    else:
        found = list(differences(json.loads(path.read_text()), now, ""))
        print("\n".join(found) or f"{len(now)} frozen outputs are identical")
        sys.exit(bool(found))
