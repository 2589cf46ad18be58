"""Time per token of generation with a key-value cache, against computing the whole context.

python -m benchmarks.generate            # 16 new tokens after a context of 512, in 9 rounds

Both are the rule of `dmoe.models.next_logits` on the quickstart's model with random weights, one
thread, interleaved. Processor time, so that other programs disturb little; the first pass over the
context is left out, since both have it once.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from dmoe.config.load import load
from dmoe.models.next_logits import Cached, Recomputed, Text
from dmoe.models.transformer import Transformer


def milliseconds(rule: Recomputed, ids: list[int], tokens: int) -> float:
    """Return the processor time per token after the first pass over the context."""
    text = Text(list(ids), torch.Generator())
    with torch.no_grad():
        text.ids.append(int(rule([text])[0].argmax()))
        start = time.process_time()
        for _ in range(tokens):
            text.ids.append(int(rule([text])[0].argmax()))
    return 1000 * (time.process_time() - start) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config, window = load(), 2 * given.context
    model = Transformer(config.model, config.moe, 256).eval()
    ids = torch.randint(256, (given.context,)).tolist()
    times: dict[str, list[float]] = {"whole context": [], "cache": []}
    for _ in range(given.rounds):
        times["whole context"].append(milliseconds(Recomputed(model, window, 0), ids, given.tokens))
        cached = Cached(model, window, 0, given.tokens + 2)
        times["cache"].append(milliseconds(cached, ids, given.tokens))
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:14} {middle:6.2f} ms per token ({low:.2f} .. {high:.2f})")
    ratios = [a / b for a, b in zip(times["whole context"], times["cache"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{'ratio':14} {middle:6.1f} ({low:.1f} .. {high:.1f})")


if __name__ == "__main__":
    main()
