"""The reference's evaluation: sums over the held-out samples, by their definition.

    loss = sum of -log p(target) / number of targets;   bits per byte = sum / ln 2 / bytes of text
    accuracy = share of targets with the largest logit

Nothing of `dmoe/train/evaluation/` or `routing_analysis.py` is called. `numbers` makes the same
keys from the real result.

Letters: B samples of one forward, S positions, T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmoe.modular import adapter_layers
from dmoe.moe.routing import TokenContext
from dmoe.train.engine import Engine
from dmoe.train.evaluation import Evaluation
from dmoe.verify.arrays import computed_experts
from dmoe.verify.cases import MICRO_BATCH
from dmoe.verify.decisions import Capture, record_routing
from dmoe.verify.naive.step import IGNORED_TARGET

SUMS = ("loss", "targets", "bytes", "correct")


def numbers(result: Evaluation) -> Capture:
    """Return loss, metrics and pairs of experts of a real evaluation, by name."""
    record = result.record()
    nested: dict[str, Any] = {
        name: record[name]
        for name in ("loss", "tokens", "bits_per_byte", "accuracy", "missing", "by_domain")
        if name in record
    }
    nested["co_selection"] = {n: layer["co_selection"] for n, layer in enumerate(result.layers)}
    return dict(_flat("evaluation", nested))


@torch.no_grad()
def evaluate(engine: Engine) -> Capture:
    """Evaluate the first `train.eval_sequences` held-out samples with the naive model."""
    data = engine.task.open_data()
    engine.model.eval()
    sums_ME, pairs = _sums(engine, data, None)
    found: dict[str, Any] = _metrics(engine, sums_ME.sum(0))
    missing = {}
    for stream in engine.task.streams:
        sums, _ = _sums(engine, data, stream)
        missing[stream] = _metrics(engine, sums.sum(0))["accuracy"]
    if len(data.domains) > 1:
        found["by_domain"] = {
            name: _metrics(engine, sums)
            for name, sums in zip(data.domains, sums_ME, strict=True)
            if sums[1]
        }
    engine.model.train()
    found |= {"missing": missing, "co_selection": pairs, "changed state": 0}
    return dict(_flat("evaluation", found))


def _sums(
    engine: Engine, data: Any, missing: str | None
) -> tuple[np.ndarray[Any, Any], dict[int, np.ndarray[Any, Any]]]:
    """Return the sums of each domain [M, 4], and how often each layer chose a pair of experts.

    One forward has as many samples as those of all ranks together; behind the last sample there is
    padding. Positions of a prompt or prefix have no pairs.
    """
    task, config, layers = engine.task, engine.config, engine.model.moe_layers()
    size = MICRO_BATCH * config.parallel.virtual_ranks
    total = min(config.train.eval_sequences, data.held_out.num_sequences or math.inf)
    banks = [layer.experts for layer in adapter_layers(engine.model).values()]
    prefix = max((bank.num_prefix_tokens for bank in banks), default=0)
    totals = np.zeros((max(1, len(data.domains)), len(SUMS)))
    pairs: dict[int, np.ndarray[Any, Any]] = {}
    for first in range(0, int(total), size):
        count = min(size, int(total) - first)
        samples, empty = task.samples(data.held_out, first, count), task.dummy_batch(size)
        input = torch.cat([samples.input, empty.input[count:]])
        label_B = torch.cat([samples.label_B, empty.label_B[count:]])
        if missing is not None:
            input = task.mask_stream(input, missing)
        length = samples.target.shape[1]
        context = TokenContext(
            valid_T=_padded(samples.valid_BS, samples.target, size).bool(),
            position_T=None
            if samples.position_BS is None
            else _padded(samples.position_BS, samples.target, size),
            label_T=label_B.repeat_interleave(length),
            first_sequence=first,
        )
        with record_routing(layers) as (outputs, _):
            logit_BSV = engine.model(input, None, context).logits[:count]
        for b in range(count):
            domain = int(samples.label_B[b]) if len(data.domains) > 1 else 0
            for position, target in enumerate(samples.target[b].tolist()):
                if target == IGNORED_TARGET:
                    continue
                totals[domain] += _target_sums(logit_BSV[b, position], target, data)
        for n, output in enumerate(outputs):
            chosen_TE = computed_experts(output.routing).astype(np.float64)
            experts = chosen_TE.shape[1]
            chosen_TE = chosen_TE.reshape(size, -1, experts)[:, prefix:].reshape(-1, experts)
            pairs[n] = pairs.get(n, 0) + chosen_TE.T @ chosen_TE
    return totals, pairs


def _padded(value_BS: Tensor | None, target: Tensor, size: int) -> Tensor:
    """Return one number per token of `size` sequences: 1 by default, 0 behind the last one."""
    value_BS = torch.ones_like(target) if value_BS is None else value_BS.long()
    none_MS = target.new_zeros(size - len(target), target.shape[1])
    return torch.cat([value_BS, none_MS]).flatten()


def _target_sums(logit_V: Tensor, target: int, data: Any) -> list[float]:
    """Return loss, 1, bytes of text and correctness of one target."""
    loss = float(torch.logsumexp(logit_V, 0) - logit_V[target])
    tokenizer = getattr(data, "tokenizer", None)
    size = 0.0 if tokenizer is None else float(tokenizer.token_bytes[target])
    return [loss, 1.0, size, float(int(logit_V.argmax()) == target)]


def _metrics(engine: Engine, sums: np.ndarray[Any, Any]) -> dict[str, float]:
    loss, targets, size, correct = (float(value) for value in sums)
    found = {"loss": loss / targets, "tokens": targets}
    if engine.config.train.task == "language_modelling":
        return found | {"bits_per_byte": loss / math.log(2) / size}
    return found | {"accuracy": correct / targets}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the leaves of a tree of dictionaries as arrays, by their path."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(f"{prefix}/{name}", part)
    else:
        yield prefix, np.array(value, np.float64)
