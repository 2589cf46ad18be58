"""A model, router, loss and loop of one's own; the same numbers on one process and on two ranks.

torchrun --standalone --nproc-per-node 2 examples/own_loop.py out.safetensors fsdp  # ddp, none
"""

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import dmoe

BALANCE = dmoe.BalanceConfig(switch=0.01, switch_level="global", z=0.0, bias=0.001)


class NearestRouter(dmoe.LearnedRouter):
    def forward(
        self, x_TD: Tensor, context: dmoe.TokenContext, shape: dmoe.BatchShape
    ) -> dmoe.Routing:
        logit_TE = -torch.cdist(self.router_input(x_TD, context, shape), self.weight)
        return self.route(logit_TE, logit_TE.softmax(-1), context, shape)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.moes = nn.Linear(6, 16), nn.Linear(16, 3), nn.ModuleList()
        for layer in range(2):
            moe = dmoe.MoE(16, 32, num_experts=4, top_k=2, layer=layer, balance=BALANCE)
            moe.router = NearestRouter(dmoe.RouterConfig(), 16, 4, 2, layer)
            moe.initialize(seed=0, std=0.3)
            self.moes.append(moe)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden, loss = self.inner(x), x.new_zeros(())
        for moe in self.moes:
            out = moe(hidden)
            hidden, loss = hidden + out.y, loss + BALANCE.switch * out.aux["switch"]
        return loss + nn.functional.multi_margin_loss(self.outer(hidden).flatten(0, 1), y.flatten())


path, mode = (*sys.argv[1:], "ddp")[:2]
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
torch.manual_seed(0)
model = dmoe.parallelize(Net(), ep=world, mode=None if mode == "none" else mode)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(4):
    x, y = torch.randn(8, 5, 6), torch.randint(3, (8, 5))  # the batch of all ranks
    model.backward(model(x.chunk(world)[rank], y.chunk(world)[rank]))
    norm = model.clip_grad_norm_(0.5)
    optimizer.step()
    optimizer.zero_grad()
state = model.state_dict()  # on every rank; saved on one
if rank == 0:
    save_file({"norm": torch.tensor(norm), **state}, path)
