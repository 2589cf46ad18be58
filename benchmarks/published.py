"""A block of transformers that `dmoe.moefy` has changed, against `dmoe.MoE` with the same weights.

python -m benchmarks.published          # 30 rounds

Forward and backward of Mixtral's block (D=512, F=256, E=32, K=4, 1,024 tokens) in float32 on one
thread, interleaved, in processor time. Their outputs are equal, which is checked first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import dmoe

D, F, E, K, T = 512, 256, 32, 4, 1024


class Block(nn.Module):
    """Mixtral's block, with the config that `moefy` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = MixtralConfig(
            hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
        )
        self.config._experts_implementation = "eager"
        self.block = MixtralSparseMoeBlock(self.config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


def seconds(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the processor time of a forward and backward."""
    x = x.clone().requires_grad_()
    start = time.process_time()
    layer(x).square().mean().backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    moefied: Any = dmoe.moefy(Block())
    own = dmoe.MoE(D, F, E, K, balance=dmoe.BalanceConfig(switch=0, z=0))
    with torch.no_grad():
        own.router.get_parameter("weight").copy_(moefied.block.gate.weight)
        own.experts.w_in.copy_(moefied.block.experts.gate_up_proj.transpose(1, 2))
        own.experts.w_out.copy_(moefied.block.experts.down_proj.transpose(1, 2))
    x = torch.randn(1, T, D)
    difference = float((moefied(x) - own(x).y).abs().max())
    assert difference < 1e-5, f"the outputs differ by {difference}"
    ratios, times = [], []
    for number in range(rounds + 3):
        pair = seconds(moefied, x), seconds(lambda x: own(x).y, x)
        if number >= 3:
            times.append(pair)
            ratios.append(pair[0] / pair[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    for name, values in zip(("moefied", "dmoe.MoE"), zip(*times, strict=True), strict=True):
        print(f"{name:9} {1000 * statistics.median(values):6.1f} ms")
    print(f"ratio     {middle:6.3f} ({low:.3f} .. {high:.3f})")


if __name__ == "__main__":
    main()
