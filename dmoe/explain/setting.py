"""A config on so many ranks, with what follows from it: the degrees, the micro-batches, the model without its weights, the slots.

Slots and shapes are asked of the code that trains, never computed a second time here.

Letters: T tokens of one process in one micro-batch, E experts, EP expert-parallel degree, G groups that share a capacity, C slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmoe.config.rules import Batching, batching, check, expert_parallel
from dmoe.config.schema import Config
from dmoe.models.base import Model
from dmoe.moe.comm import NoComm
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext
from dmoe.train import engine as precisions
from dmoe.train.modular.attach import attach_modules, select_trained
from dmoe.train.tasks import Task, task_of

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


class StubComm(NoComm):
    """Peers that are not there: enough for shapes, and wrong for anything else, so that nothing else is asked."""

    def __init__(self, size: int) -> None:
        self.size = size


@dataclass(frozen=True)
class Setting:
    config: Config
    world: int
    ep: int
    batching: Batching
    task: Task
    precision: str
    """fp32, bf16 or fp16."""
    model: Model
    """On the meta device, with all experts."""

    @property
    def layer(self) -> MoE | None:
        """The first MoE layer; all are alike, but for a classifier's last one, which may have another width."""
        layers = self.model.moe_layers()
        return layers[0] if layers else None

    @property
    def edp(self) -> int:
        return self.world // self.ep

    @property
    def sequences(self) -> int:
        """Sequences of one forward of one process: its virtual ranks' micro-batches."""
        return self.batching.micro_batch * self.config.parallel.virtual_ranks

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.task.targets

    @property
    def itemsize(self) -> int:
        """Bytes of a number that travels: rows are exchanged in the precision the experts compute in."""
        return ITEMSIZE[self.precision]

    def owned(self, rank: int) -> tuple[int, ...]:
        """Global ids of a rank's experts, ascending; the same in all layers."""
        assert self.layer is not None
        return tuple(sorted(self.layer.experts.placement(self.ep).experts[rank % self.ep]))

    @property
    def places(self) -> int:
        """Places that an EP group offers for experts: as many as there are, or more where ranks have unequal numbers of them."""
        assert self.layer is not None
        ownership = self.layer.experts.placement(self.ep)
        return ownership.experts_per_rank * self.ep

    def slots(self, training: bool = True) -> TokenContext:
        """`groups` G and `capacity` C (None: dropless) of one forward, as the layer works them out."""
        assert self.layer is not None
        self.layer.train(training)
        return self.layer.with_shapes(TokenContext(), self.sequences, self.tokens)


def resolve(config: Config, world: int) -> Setting:
    """Raises ConfigError for what `dmoe train` would refuse on `world` ranks, but for what only the machine decides."""
    check(config, world)
    task = task_of(config)
    with torch.device("meta"):
        model = task.model(config.parallel.virtual_ranks)
        attach_modules(model, config, config.parallel.virtual_ranks)
    select_trained(model, config)
    for layer in model.moe_layers():
        layer.comm = StubComm(world)
    ep = expert_parallel(config, world)
    return Setting(config, world, ep, batching(config, world), task, _precision(config), model)


def _precision(config: Config) -> str:
    """`auto` as this machine answers it; for GPUs that are not here, bf16, which all since Ampere have."""
    if config.train.precision != "auto":
        return config.train.precision
    if config.train.device == "cuda" and not torch.cuda.is_available():
        return "bf16"
    here = "cuda" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu"
    return precisions.resolve("auto", torch.device(here), config.model.dim)
