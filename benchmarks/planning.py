"""Step times that `dmoe plan` predicts against those of `dmoe train`: for docs/planning.md.

    python -m benchmarks.planning --measure RESULTS                  # trains; again: appends
    python -m benchmarks.planning --results RESULTS --cluster FILE   # compares, prints the section
    python -m benchmarks.planning --results RESULTS --cluster FILE --write

None of the five configs has a part in the calibration. Each is trained on W local gloo ranks by the
command line; a time is that between two lines of metrics.jsonl, of which each is two steps. Where
the machine's speed drifts, measure by turns with `dmoe plan --calibrate`, one config at a time
(`--config`), at a priority that keeps other programs off the cores (`chrt -r 10`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dmoe import read_metrics
from dmoe.config.load import load
from dmoe.config.rules import expert_parallel
from dmoe.config.schema import Config
from dmoe.simulation.cluster import Cluster, load_cluster
from dmoe.simulation.dry_run import dry_run
from dmoe.simulation.step_time import StepTime, step_time

BASE = (
    "data.source=synthetic:zipf train.device=cpu train.eval_sequences=8 train.sample_tokens=1"
    " optim.warmup=5"
)
CONFIGS = {
    "quickstart": "configs/quickstart.yaml",
    "narrow, 16 experts": "configs/cpu_8_ranks.yaml parallel.ep=auto"
    " moe.router.kind=workload data.seq_len=128",
    "padded, fsdp": "model.dim=192 model.layers=3 moe.num_experts=16 moe.expert_dim=256"
    " moe.exchange=padded moe.capacity.factor=1.25 data.seq_len=192 train.global_batch=8"
    " parallel.mode=fsdp",
    "bf16, accumulated": "model.dim=576 model.layers=1 model.heads=9 moe.num_experts=8 moe.top_k=2"
    " moe.expert_dim=512 moe.router.kind=workload data.seq_len=128 train.global_batch=8"
    " train.micro_batch=1 train.precision=bf16",
    "top-4 of 32, recompute": "model.dim=224 model.layers=3 model.heads=7 moe.num_experts=32"
    " moe.top_k=4 moe.expert_dim=112 moe.experts.shared=1 moe.router.kind=workload"
    " data.seq_len=128 train.global_batch=16 train.recompute=block",
}
"""None has the widths of a calibration model. The first and the third learn their routing."""
VOCABULARY = 256
EVERY = 2
"""Steps between two lines of metrics."""
DOCUMENT = Path(__file__).parent.parent / "docs" / "planning.md"
BEGIN, END = "<!-- step times: begin -->", "<!-- step times: end -->"


def measure(arguments: list[str], world: int, steps: int) -> dict[str, Any]:
    """Train, and return the seconds of each step and the load of the busiest rank over the mean."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        options = [f"train.steps={steps}", f"train.log_every={EVERY}", f"train.eval_every={steps}"]
        ranks = ["--ranks", str(world)] if world > 1 else []
        command = [sys.executable, "-m", "dmoe", "train", *arguments, *options]
        subprocess.run(
            [*command, f"train.run_dir={run}", *ranks, "--quiet"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = [line for line in read_metrics(run) if line["event"] == "train"]
    (first, *_, last) = lines
    tokens = (last["tokens"] - first["tokens"]) / (last["step"] - first["step"])
    warm = lines[1 + len(lines) // 5 :]
    return {
        "seconds": [tokens / line["tokens_per_second"] for line in warm],
        "load": statistics.fmean(line.get("rank_max_over_mean", 1.0) for line in warm),
        "phases": {
            phase: statistics.median(line["step_time"][phase] for line in warm)
            for phase in warm[0]["step_time"]
        },
    }


def config_of(name: str) -> Config:
    """Return a config of `CONFIGS`."""
    path, *rest = [*CONFIGS[name].split(), *BASE.split()]
    return load(path, rest) if path.endswith(".yaml") else load(None, [path, *rest])


def predict(name: str, world: int, cluster: Cluster, load_of_rank: float) -> StepTime:
    """Return the predicted step, at the load that the run has recorded."""
    config = config_of(name)
    # ranks that share a core wait for their sum, not for the busiest one
    rows = max(1.0, load_of_rank / max(1.0, world / cluster.devices))
    precision = "bf16" if config.train.precision == "bf16" else "fp32"
    run = dry_run(config, world, precision, cuda=False, load=rows, num_outputs=VOCABULARY)
    return step_time(run, cluster, expert_parallel(config, world))


def compare(results: dict[str, Any], cluster: Cluster) -> list[str]:
    """Return the table of step times as lines of Markdown, and what it amounts to."""
    lines = [
        "| config | ranks | predicted, ms | measured, ms (quartiles) | error |",
        "|---|---|---|---|---|",
    ]
    errors = []
    for name, worlds in results.items():
        for world, found in sorted(worlds.items(), key=lambda item: int(item[0])):
            times = predict(name, int(world), cluster, found["load"])
            low, middle, high = statistics.quantiles(found["seconds"], n=4)
            errors.append(times.total / middle - 1)
            lines.append(
                f"| {name} | {world} | {1000 * times.total:.0f} | {1000 * middle:.0f} "
                f"({1000 * low:.0f} .. {1000 * high:.0f}) | {errors[-1]:+.0%} |"
            )
    sizes = [abs(error) for error in errors]
    lines += [
        "",
        f"Median error {statistics.median(sizes):.0%}, worst {max(sizes):.0%}; allowed are 10% "
        f"and 20%. Cluster file: {cluster.name}.",
    ]
    return lines


def write(lines: list[str], begin: str = BEGIN, end: str = END) -> None:
    """Put lines between two markers of docs/planning.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, begin, rest = text.partition(begin)
    _, end, after = rest.partition(end)
    assert end, f"{DOCUMENT} has no markers"
    body = "\n".join(lines)
    DOCUMENT.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", metavar="FILE", help="train, and put the times there")
    parser.add_argument("--config", choices=CONFIGS, help="measure this one only")
    parser.add_argument("--ranks", default="1,2,4", help="measure these only")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--results", metavar="FILE", help="times to compare with")
    parser.add_argument("--cluster", default="laptop")
    parser.add_argument("--write", action="store_true", help="change docs/planning.md")
    given = parser.parse_args()
    if given.measure:
        path = Path(given.measure)
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in [given.config] if given.config else CONFIGS:
            for world in given.ranks.split(","):
                arguments = [*CONFIGS[name].split(), *BASE.split()]
                found = measure(arguments, int(world), given.steps)
                results.setdefault(name, {})[world] = found
                path.write_text(json.dumps(results), encoding="utf-8")
    if given.results:
        results = json.loads(Path(given.results).read_text(encoding="utf-8"))
        lines = compare(results, load_cluster(given.cluster))
        write(lines) if given.write else print("\n".join(lines))


if __name__ == "__main__":
    main()
