"""A config on a given number of ranks, and what follows from it: sizes, batches, model, slots.

Slots and shapes come from the code that trains; nothing is computed a second time here.

Letters: T tokens of one process in one micro-batch, E experts, EP expert-parallel size, G groups
that share a capacity, C slots of one (group, expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dmoe.config.expert_shapes import count_choices
from dmoe.config.rules import Batching, batching, check, expert_parallel
from dmoe.config.schema import Config
from dmoe.distributed.exchange.once_per_rank import share_with_a_choice
from dmoe.distributed.padded_all_to_all import count_rows
from dmoe.models.base import Model
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.capacity import slots_of_rank
from dmoe.moe.interfaces import NoComm
from dmoe.moe.placement import ExpertPlacement
from dmoe.moe.routing import BatchShape
from dmoe.report.format import BYTES_PER_NUMBER
from dmoe.train.engine import resolve_precision
from dmoe.train.modular.attach import attach_modules, select_trainable_parameters
from dmoe.train.tasks import Task, task_of


@dataclass(frozen=True)
class Section:
    """One topic of an explanation: sentences for people and the same numbers for programs."""

    key: str
    title: str
    sentences: list[str]
    numbers: dict[str, Any]
    """Plain JSON."""


class StubComm(NoComm):
    """Communicator that knows only its size: enough for shapes, no collective works."""

    def __init__(self, size: int) -> None:
        self.size = size


@dataclass(frozen=True)
class Setting:
    """A checked config on `world` ranks, with its model on the meta device."""

    config: Config
    world: int
    ep: int
    batching: Batching
    task: Task
    precision: str
    """fp32, bf16 or fp16."""
    model: Model
    """On the meta device, with all experts."""
    ranks_per_node: int | None = None
    """Ranks of one machine, numbered machine by machine; None: not given."""

    @property
    def layer(self) -> MoELayer | None:
        """The first MoE layer, like all others; a classifier's last one may have another width."""
        layers = self.model.moe_layers()
        return layers[0] if layers else None

    @property
    def edp(self) -> int:
        """Copies of each expert."""
        return self.world // self.ep

    @property
    def sequences(self) -> int:
        """Sequences of one forward of one process: the micro-batches of its virtual ranks."""
        return self.batching.micro_batch * self.config.parallel.virtual_ranks

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.task.targets_per_sample

    @property
    def bytes_per_number(self) -> int:
        """Bytes per number of a copied expert, and of a row if the wire is full."""
        return BYTES_PER_NUMBER[self.precision]

    @property
    def wire(self) -> str:
        """Precision in which rows are exchanged: that of the experts, or bf16."""
        wire = self.config.parallel.exchange.wire
        return self.precision if wire == "full" else wire

    @property
    def collectives(self) -> tuple[int, int, int]:
        """Collectives of forward and of backward, and host syncs, of one MoE layer."""
        exchange, is_packed = self.config.parallel.exchange, self.config.moe.exchange == "packed"
        if exchange.library != "torch":
            return 2, 2, 1
        there_and_back = 2 * exchange.chunks * exchange.levels
        counts = is_packed * exchange.levels
        return counts + there_and_back, there_and_back, int(is_packed)

    @property
    def rows_per_token(self) -> float:
        """Rows of a token, to any rank, if all experts are chosen equally often; none dropped."""
        moe = self.config.moe
        # Assignments to zero-cost experts are not sent.
        rows = moe.top_k * moe.num_experts / count_choices(moe)
        exchange = self.config.parallel.exchange
        if not exchange.once_per_rank and exchange.library == "torch":
            return rows
        of_rank = moe.num_experts // self.ep
        return self.ep * share_with_a_choice(count_choices(moe), of_rank, moe.top_k)

    @property
    def nodes_of_ep_group(self) -> int | None:
        """Machines that an EP group of `ep` ranks in a row spans, at most; None: not known."""
        if self.ranks_per_node is None:
            return None
        starts = range(0, self.world, self.ep)
        size = self.ranks_per_node
        return max((first + self.ep - 1) // size - first // size + 1 for first in starts)

    def local_experts(self, rank: int) -> tuple[int, ...]:
        """Return the global ids of a rank's experts, ascending; equal in all layers."""
        return tuple(sorted(self.placement.experts[rank % self.ep]))

    @property
    def num_physical_experts(self) -> int:
        """Physical experts of an EP group: more than E if ranks have unequal numbers of them."""
        return self.placement.experts_per_rank * self.ep

    @property
    def placement(self) -> ExpertPlacement:
        """The experts of each EP rank, equal in all layers."""
        assert self.layer is not None
        found: ExpertPlacement = self.layer.experts.placement(self.ep)
        return found

    def slots(self, training: bool = True) -> BatchShape:
        """Return `groups` G and `capacity` C (None: dropless) of one forward, from the layer."""
        assert self.layer is not None
        self.layer.train(training)
        return self.layer.batch_shape(self.sequences, self.tokens)

    @property
    def pooled_block(self) -> int:
        """Rows from one rank to another if slots are pooled, those of the counts included.

        A pool that spans ranks has rows for all its slots on each of them.
        """
        moe, shape = self.config.moe, self.slots()
        assert shape.capacity is not None, "only a capacity has slots"
        tokens = self.tokens // max(1, shape.groups)
        slots = slots_of_rank(shape.capacity, tokens, moe.top_k, moe.capacity)
        row_bytes = self.config.model.dim * self.bytes_per_number
        counts = count_rows(self.num_physical_experts // self.ep, row_bytes)
        return shape.groups * slots * self.placement.pools_per_rank(moe.capacity.pool) + counts


def resolve(config: Config, world: int) -> Setting:
    """Build the setting of `config` on `world` ranks.

    Raises:
        ConfigError: for everything `dmoe train` refuses, except what depends on the machine.
    """
    check(config, world)
    task = task_of(config)
    with torch.device("meta"):
        model = task.build_model(config.parallel.virtual_ranks)
        attach_modules(model, config, config.parallel.virtual_ranks)
    select_trainable_parameters(model, config)
    for layer in model.moe_layers():
        layer.comm = StubComm(world)
    ep = expert_parallel(config, world)
    return Setting(config, world, ep, batching(config, world), task, _precision(config), model)


def _precision(config: Config) -> str:
    """Resolve `auto` as this machine does; for GPUs that are not here, bf16 (Ampere and later)."""
    if config.train.precision != "auto":
        return config.train.precision
    if config.train.device == "cuda" and not torch.cuda.is_available():
        return "bf16"
    device = "cuda" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu"
    return resolve_precision("auto", torch.device(device), config.model.dim)
