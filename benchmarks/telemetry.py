"""What it costs to measure: the time of a logged step over that of a plain one, as a share of training at the default interval.

    python -m benchmarks.telemetry                     # the quickstart's model, 1 rank
    python -m benchmarks.telemetry --ranks 2 --rounds 60 moe.exchange=padded moe.capacity.factor=1.25

Every round takes a plain step and a logged one, in an order that turns, and takes the difference within the round, so that what else
the machine does falls on both alike; the same in CPU time of rank 0, which others on the machine disturb less. A logged step holds all
that `train.log_every` brings: the observation of the routers, the clocks around every exchange, the two reductions, the line of
metrics.jsonl, and the alerts.

    cost = (logged - plain) / (interval * plain)        must stay below 2% (docs)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.distributed.local_ranks import run_ranks
from dmoe.moe.dispatch import profiled
from dmoe.runs.metrics_log import MetricsFile
from dmoe.train import engine as engines
from dmoe.train.reduction import NULL_RECORDER
from dmoe.train.step import compute_gradients, training_batches, update
from dmoe.train.telemetry import Telemetry

WARM_UP = 3
STAGES = 100_000


Seconds = tuple[float, float]
"""By the clock on the wall, and of the CPU."""


def rounds_of(
    rank: int, world: int, config: Config, rounds: int, folder: str
) -> list[tuple[Seconds, Seconds]]:
    """What (plain, logged) steps took."""
    here = worlds.init_distributed(config.train.device)
    data = open_data(config.data, config.train.seed)
    engine = engines.build_engine(config, here, data.tokenizer.vocab_size)
    telemetry, file = Telemetry(engine, data.domains), MetricsFile(Path(folder) / f"{rank}.jsonl")

    def step(number: int, logged: bool) -> Seconds:
        began, busy = time.monotonic(), time.process_time()
        batches = training_batches(data.train, engine, number)
        recorder = telemetry.start_recording(began) if logged else NULL_RECORDER
        result = update(engine, compute_gradients(engine, batches, recorder=recorder), 1e-3)
        if logged:
            values = telemetry.train_record(
                result, tokens=0, learning_rate=1e-3, seconds=1.0, interval_tokens=1
            )
            telemetry.alerts.check(values)
            file.write("train", number, values)
        return time.monotonic() - began, time.process_time() - busy

    found = []
    for turn in range(-WARM_UP, rounds):
        order = (False, True) if turn % 2 else (True, False)
        taken = {
            logged: step(2 * (turn + WARM_UP) + place, logged) for place, logged in enumerate(order)
        }
        if turn >= 0:
            found.append((taken[False], taken[True]))
    file.close()
    return found


def stage_cost() -> float:
    """Seconds of one name for a profiler that does not run, the loop around it included."""
    began = time.perf_counter()
    for _ in range(STAGES):
        with profiled("route"):
            pass
    return (time.perf_counter() - began) / STAGES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--interval", type=int, default=10, help="train.log_every")
    parser.add_argument(
        "--json", action="store_true", help="the numbers as JSON on stdout, nothing else there"
    )
    parser.add_argument("overrides", nargs="*", help="e.g. moe.exchange=padded")
    args = parser.parse_args()
    config = load(None, args.overrides)
    with tempfile.TemporaryDirectory() as folder:
        pairs = run_ranks(args.ranks, rounds_of, config, args.rounds, folder, timeout=3600.0)[0]
    found: dict[str, float] = {
        "ranks": args.ranks,
        "rounds": args.rounds,
        "stage_us": stage_cost() * 1e6,
    }
    for which, name in enumerate(("wall", "cpu")):
        shares = [
            (logged[which] - plain[which]) / (args.interval * plain[which])
            for plain, logged in pairs
        ]
        for kind, step in (("plain", 0), ("logged", 1)):
            found[f"{name}_{kind}_ms"] = (
                statistics.median(pair[step][which] for pair in pairs) * 1e3
            )
        found |= zip(
            (f"{name}_cost_q1", f"{name}_cost", f"{name}_cost_q3"),
            statistics.quantiles(shares, n=4),
            strict=True,
        )
    if args.json:
        print(json.dumps(found))
        return
    print(f"{args.ranks} rank(s), {args.rounds} rounds, one step in {args.interval} logged")
    for name, words in (("wall", "by the clock"), ("cpu", "of the CPU")):
        plain, logged, low, middle, high = (
            found[f"{name}_{key}"]
            for key in ("plain_ms", "logged_ms", "cost_q1", "cost", "cost_q3")
        )
        print(
            f"{words:13}plain {plain:.1f} ms, logged {logged:.1f} ms, cost {middle:.2%} (quartiles {low:.2%} .. {high:.2%})"
        )
    print(f"a stage's name without a profiler: {found['stage_us']:.2f} microseconds")


if __name__ == "__main__":
    main()
