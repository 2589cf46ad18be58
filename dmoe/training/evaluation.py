"""Loss on held-out sequences: deterministic, the same on any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dmoe.data import Data
from dmoe.distributed.gradients import all_sum
from dmoe.models.transformer import LMOutput
from dmoe.moe.routing import TokenContext
from dmoe.training.batches import evaluation_batches
from dmoe.training.engine import Engine

__all__ = ["Evaluation", "bits_per_byte", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Nats a token."""
    bits_per_byte: float
    """Comparable between tokenizers."""
    tokens: int


@torch.no_grad()  # not inference_mode: FSDP2 keeps the tensors it gathers into, and training could not write into them
def evaluate(engine: Engine, data: Data) -> Evaluation:
    """Mean loss over the first `train.eval_sequences` held-out sequences. One small reduction at the end."""
    device, totals = engine.world.device, torch.zeros(3, dtype=torch.float64, device=engine.world.device)
    byte_V = torch.from_numpy(data.tokenizer.token_bytes).to(device)
    engine.wrapped.eval()
    for token_BS, target_BS, valid_BS, label_B in evaluation_batches(data.held_out, engine):
        target_BS, valid_BS = target_BS.to(device), valid_BS.to(device)
        label_T = label_B.to(device).repeat_interleave(token_BS.shape[1])
        context = TokenContext(valid_T=valid_BS.flatten(), label_T=label_T)
        output: LMOutput = engine.wrapped(token_BS.to(device), target_BS, context)
        assert output.loss_sum is not None
        read = byte_V[target_BS.clamp(min=0)].masked_fill(~valid_BS, 0).sum()
        totals += torch.stack([output.loss_sum.double(), valid_BS.sum().double(), read.double()])
    engine.wrapped.train()
    loss_sum, tokens, read_bytes = all_sum(totals, engine.topology).tolist()
    return Evaluation(loss_sum / tokens, bits_per_byte(loss_sum, read_bytes), int(tokens))


def bits_per_byte(nats: float, read_bytes: float) -> float:
    """Bits the model needs for a byte of text, from the summed cross-entropy over it."""
    return nats / math.log(2) / max(1.0, read_bytes)
