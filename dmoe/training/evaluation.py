"""Loss on held-out sequences: deterministic, the same on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dmoe.data import Data
from dmoe.distributed.gradients import all_sum
from dmoe.models.transformer import LMOutput
from dmoe.moe.observation import decisions
from dmoe.moe.stats import ObservedContext, nothing_more
from dmoe.training.batches import evaluation_batches
from dmoe.training.engine import Engine
from dmoe.training.probe import Look, Probe

__all__ = ["Evaluation", "bits_per_byte", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Nats a token."""
    bits_per_byte: float
    """Comparable between tokenizers."""
    tokens: int
    layers: list[dict[str, Any]] = field(default_factory=list)
    """What the probe saw of each MoE layer; empty without one."""


@torch.no_grad()  # not inference_mode: FSDP2 keeps the tensors it gathers into, and training could not write into them
def evaluate(
    engine: Engine, data: Data, stop: Callable[[], bool] = lambda: False, probe: Probe | None = None
) -> Evaluation | None:
    """Mean loss over the first `train.eval_sequences` held-out sequences; None if some rank was told to `stop` on the way.

    One small reduction and one host read a batch, so that a signal does not have to wait for the last one. `probe` looks at the
    layers' decisions on the way, for one reduction more.
    """
    device, totals = engine.world.device, torch.zeros(4, dtype=torch.float64, device=engine.world.device)
    byte_V = torch.from_numpy(data.tokenizer.token_bytes).to(device)
    engine.wrapped.eval()
    looks: list[Look] = []
    for token_BS, target_BS, valid_BS, label_B in evaluation_batches(data.held_out, engine):
        target_BS, valid_BS = target_BS.to(device), valid_BS.to(device)
        label_T = label_B.to(device).repeat_interleave(token_BS.shape[1])
        observer = nothing_more if probe is None else decisions
        context = ObservedContext(valid_T=valid_BS.flatten(), label_T=label_T, observer=observer)
        output: LMOutput = engine.wrapped(token_BS.to(device), target_BS, context)
        assert output.loss_sum is not None
        read = byte_V[target_BS.clamp(min=0)].masked_fill(~valid_BS, 0).sum()
        share = [output.loss_sum, valid_BS.sum(), read, torch.full_like(output.loss_sum, float(stop()))]
        totals += all_sum(torch.stack([part.double() for part in share]), engine.topology)
        if totals[3].item() > 0:
            break
        if probe is not None:
            looks = probe.look(output.stats, label_T, looks)
    engine.wrapped.train()
    loss_sum, tokens, read_bytes, stopped = totals.tolist()
    if stopped:
        return None
    layers = [] if probe is None else probe.report(looks)
    return Evaluation(loss_sum / tokens, bits_per_byte(loss_sum, read_bytes), int(tokens), layers)


def bits_per_byte(nats: float, read_bytes: float) -> float:
    """Bits the model needs for a byte of text, from the summed cross-entropy over it."""
    return nats / math.log(2) / max(1.0, read_bytes)
