"""Published speeds of MoE training on GPUs, and what `dmoe plan` predicts for the same layout.

    python -m benchmarks.published_points            # a table
    python -m benchmarks.published_points --only simumax

The points and their sources are in `published_points.yaml`. Each is predicted with the shipped
cluster file, uncalibrated; nothing was fitted to a point.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.simulation.cluster import load_cluster, usable_memory
from dmoe.simulation.load import Load
from dmoe.simulation.search import Estimate, Search, given_layout

POINTS = Path(__file__).with_suffix(".yaml")
REPOSITORY = POINTS.parents[1]


def content() -> dict[str, Any]:
    """Return models, sources, points and what was left out."""
    read: dict[str, Any] = yaml.safe_load(POINTS.read_text(encoding="utf-8"))
    return read


def config_of(point: dict[str, Any], model: dict[str, Any]) -> Config:
    """Return the config of a point."""
    path = REPOSITORY / model["config"] if "config" in model else None
    return load(path, [*model.get("overrides", ()), *point["overrides"], "train.precision=bf16"])


def predict(point: dict[str, Any], model: dict[str, Any]) -> Estimate:
    """Return the planner's estimate of a point: of its own layout, with balanced experts."""
    config = config_of(point, model)
    cluster, world, moe = load_cluster(point["cluster"]), point["gpus"], config.moe
    search = Search(
        config, world, cluster, "bf16", Load(moe.num_experts, moe.top_k, moe.capacity.factor),
        model["vocabulary"], (0, 0),
    )  # fmt: skip
    try:
        return search.estimate(given_layout(config, world), usable_memory(cluster, world))
    finally:
        search.close()


def rows(only: str = "") -> Iterator[dict[str, Any]]:
    """Yield predicted beside published, point by point: tokens/s of a GPU, error, parts, memory.

    The error is (predicted - published) / published, of tokens/s.

    Args:
        only: sources whose name begins so.
    """
    read = content()
    for point in read["points"]:
        if not point["source"].startswith(only):
            continue
        model = read["models"][point["model"]]
        estimate = predict(point, model)
        given = dict(override.split("=") for override in point["overrides"])
        tokens = int(given["train.global_batch"]) * int(given["data.seq_len"]) / point["gpus"]
        published = point["published"]
        speed = published.get("tokens") or tokens / published["seconds"]
        predicted = tokens / estimate.time.total
        yield {
            "name": point["name"],
            "source": point["source"],
            "gpus": point["gpus"],
            "cluster": point["cluster"],
            "layout": point["layout"],
            "expressible": point["expressible"],
            "differs": model.get("differs", ""),
            "published": speed,
            "predicted": predicted,
            "error": predicted / speed - 1,
            "published_memory": published.get("memory"),
            "predicted_memory": estimate.memory.peak / 1e9,
            "parts": {
                part.name: getattr(estimate.time, part.name) / estimate.time.total
                for part in fields(estimate.time)
            },
        }


def median_error(found: list[dict[str, Any]]) -> float:
    """Return the median of the absolute errors of the points whose layout dmoe can be given."""
    errors = [abs(row["error"]) for row in found if row["expressible"] is True]
    return statistics.median(errors)


HEAD = "| model | GPUs | source | layout | published | predicted | error | largest parts |"


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a markdown table: tokens per second of a GPU, memory where published."""
    lines = [HEAD, "|---|---|---|---|---|---|---|---|"]
    for row in found:
        parts = sorted(row["parts"].items(), key=lambda part: -part[1])[:3]
        largest = ", ".join(f"{name} {share:.0%}" for name, share in parts)
        published, predicted = (f"{row[key]:,.0f}" for key in ("published", "predicted"))
        if row["published_memory"]:
            published += f", {row['published_memory']:.0f} GB"
            predicted += f", {row['predicted_memory']:.0f} GB"
        error = f"{row['error']:+.0%}" + ("" if row["expressible"] is True else " (nearest)")
        lines.append(
            f"| {row['name']} | {row['gpus']} {row['cluster']} | {row['source']} | {row['layout']} "
            f"| {published} | {predicted} | {error} | {largest} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="sources whose name begins so")
    found = list(rows(parser.parse_args().only))
    print("\n".join(table(found)))
    if any(row["expressible"] is True for row in found):
        print(f"\nMedian of the absolute errors of expressible layouts: {median_error(found):.1%}")


if __name__ == "__main__":
    main()
