"""A training step of one rank on tensors without memory: the real model, dispatchers and optimizer.

`train.step.train_step` runs as in a training, under torch's fake tensors and fake process group, so
a world of 1,024 ranks and 671 billion parameters cost milliseconds. What a step reads on the host
(rows per expert, counts, norms) is answered by an assumed load.

Of blocks with equal parameters only some are run: their records are equal, and the step is composed
of them (`memory.py`). A test compares the composition with the run of all blocks.

Letters: T tokens of a forward, E experts, P = EP ranks, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dmoe.config.rules import batching, check, expert_parallel
from dmoe.config.schema import Config
from dmoe.data.token_streams import masks_by_default
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.fake_world import counted_exchange, fake_world, materialize
from dmoe.distributed.fsdp import blocks
from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.init import ProcessInfo
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.optimizers.offloaded_adamw import OffloadedAdamW
from dmoe.models.base import Model
from dmoe.models.transformer import Transformer
from dmoe.simulation.recording.host_reads import HostReads
from dmoe.simulation.recording.recorder import Stage, StepRecorder
from dmoe.simulation.state import StateBytes, kind_of, states_of_blocks
from dmoe.train.engine import DATA_PARALLEL, Engine
from dmoe.train.modular.attach import attach_modules, select_trainable_parameters
from dmoe.train.optimizer import build_optimizer
from dmoe.train.step import Batch, forward, train_step
from dmoe.train.tasks import task_of

REPEATED = {"ddp": 3, "fsdp": 4}
"""Blocks of one kind that are run: the first one, one for all between, and the last; with FSDP2,
which gathers one block ahead, the first two."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DryRun:
    """Record of one step of one rank."""

    stages: list[Stage]
    kinds: list[str]
    """Kind of each block that was run."""
    all_kinds: list[str]
    """Kind of each block of the model, first to last."""
    state_of_kind: dict[str, StateBytes]
    """One block of each kind; "": of all that is in no block."""
    before: int
    """Bytes that were live when the step began."""
    index_ranges: int
    """Bytes that its first forward left in the layers, for all later ones."""
    tokens: int
    """T."""
    accumulation: int
    group_names: dict[str, str]
    """ep, edp, control: names of the process groups; all others are those of all ranks."""


class DryAccelerator:
    """The parts of accelerate's Accelerator that a step uses: autocast and the backward."""

    scaler = None

    def __init__(self, precision: str, recorder: StepRecorder) -> None:
        self.dtype, self.recorder = DTYPES.get(precision), recorder

    def prepare_model(self, model: nn.Module, **options: Any) -> nn.Module:
        """Put the model under autocast."""
        if self.dtype is not None:
            autocast = torch.autocast("cpu", self.dtype)
            model.forward = autocast(model.forward)
        return model

    def backward(self, loss: Tensor) -> None:
        """Run the backward, in stages of its own."""
        self.recorder.mark("head backward")
        self.recorder.in_backward = True
        loss.backward()  # type: ignore[no-untyped-call]
        self.recorder.in_backward = False
        self.recorder.mark("update")


def dry_run(
    config: Config,
    world: int,
    precision: str,
    *,
    cuda: bool,
    load: float = 1.0,
    every: bool = False,
    num_outputs: int | None = None,
    kinds: list[str] | None = None,
    forward_only: bool = False,
) -> DryRun:
    """Run one step of rank 0 of `world` without memory, and return its record.

    Args:
        config: a whole config.
        world: number of ranks.
        precision: fp32, bf16 or fp16.
        cuda: as on a GPU; else as on a CPU.
        load: rows that this rank receives, over those of a balanced router.
        every: run every block; else those that stand for the others.
        num_outputs: vocabulary size, if it is known.
        kinds: `block_kinds` of the config, if they are known.
        forward_only: end behind the first forward; for `Memory.activations`.

    Raises:
        ConfigError: for everything that `dmoe train` refuses.
    """
    check(config, world)
    kinds = kinds or block_kinds(config, num_outputs)
    repeated = None if every else REPEATED[config.parallel.mode]
    if len(list(groupby(kinds))) > len(set(kinds)):
        repeated = None  # kinds take turns, and what FSDP2 gathers ahead depends on the next one
    last = len(kinds)
    if repeated is not None and config.model.source is None and not _is_table(config):
        last = 1 + max(
            (i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < repeated), default=-1
        )
    few = replace(config, model=replace(config.model, layers=last))
    with fake_world(world, expert_parallel(config, world)) as mesh:
        reads = HostReads(load, cuda)
        run = (few, world, precision, mesh, reads, repeated, num_outputs, kinds, forward_only)
        return _run(*run)


def block_kinds(
    config: Config, num_outputs: int | None = None, model: Model | None = None
) -> list[str]:
    """Return the kind of each block, first to last, of the meta device's model of the config."""
    with torch.device("meta"):
        model = model or task_of(config, num_outputs).build_model(config.parallel.virtual_ranks)
        attach_modules(model, config, config.parallel.virtual_ranks)
    select_trainable_parameters(model, config)
    return [kind_of(block) for block in blocks(model)]


def _is_table(config: Config) -> bool:
    return config.train.task == "classification"


def _run(
    config: Config,
    world: int,
    precision: str,
    mesh: ParallelMesh,
    reads: HostReads,
    repeated: int | None,
    num_outputs: int | None,
    all_kinds: list[str],
    forward_only: bool,
) -> DryRun:
    task, batch = task_of(config, num_outputs), batching(config, world)
    virtual = config.parallel.virtual_ranks
    with torch.device("meta"):
        model = task.build_model(virtual, config.train.recompute)
        attach_modules(model, config, virtual)
    model.offload = config.train.offload == "activations"
    select_trainable_parameters(model, config)
    built = [kind_of(block) for block in blocks(model)]
    assert built == all_kinds[: len(built)], "a block depends on the number of blocks"
    shard_experts(model, mesh, exchange=counted_exchange(config))
    if isinstance(model, Transformer) and repeated is not None:
        # In the order of the whole model: FSDP2 gathers the next block ahead.
        pool = list(zip(built, model.blocks, strict=True))
        built = [all_kinds[place] for place in _positions(repeated, all_kinds)]
        chosen = list[tuple[str, nn.Module]]()
        for kind in built:
            chosen.append(pool.pop(next(i for i, pair in enumerate(pool) if pair[0] == kind)))
        model.blocks = nn.ModuleList(block for _, block in chosen)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = StepRecorder(reads.cuda)
    reads.ranks, reads.sequences = mesh.ep, batch.micro_batch * virtual
    reads.tokens = reads.sequences * task.targets_per_sample
    accelerator = DryAccelerator(precision, recorder)
    wrap = partial(DATA_PARALLEL[config.parallel.mode], model, mesh, cast(Any, accelerator))
    # FSDP2 shards on the meta device and is filled afterwards; DDP makes its buckets at once.
    data_parallel = wrap() if config.parallel.mode == "fsdp" else None
    with fake, reads.answering(), recorder:
        materialize(model)
        data_parallel = data_parallel or wrap()
        optimizer = build_optimizer(model, config.optim)
        if isinstance(optimizer, OffloadedAdamW):
            optimizer.allocate_moments()
            recorder.forget(optimizer.host_memory())
        if not forward_only:
            _first_update(model, optimizer)
        local = (local_tensor(p).untyped_storage()._cdata for p in model.parameters())
        recorder.weights = set(local)
        for layer in model.moe_layers():
            layer.pending_counts, layer.masks.is_given = None, not task.predicts_all_targets
        accumulation = min(2, batch.accumulation)
        process = ProcessInfo(0, world, 0, torch.device("cpu"))
        few = replace(batch, accumulation=accumulation)
        engine = Engine(
            config, process, mesh, few, precision, cast(Any, accelerator), task, model,
            data_parallel, optimizer, None,
        )  # fmt: skip
        batches = [_batch(engine) for _ in range(accumulation)]
        reads.targets = batches[0].target.numel()
        _watch_stages(model, recorder)
        reads.watch(model)
        recorder.mark("step")
        before = recorder.live
        if forward_only:
            output = forward(engine, batches[0], None)
            recorder.mark("update")
            del output
        else:
            train_step(engine, batches, config.optim.lr)
        recorder.mark("end")
        has_buckets = getattr(data_parallel, "ddp", None) is not None
        state = states_of_blocks(model, built, optimizer, has_buckets)
    names = {
        name: group.group_name
        for name in ("ep", "edp", "control")
        if (group := getattr(mesh, f"{name}_group")) is not None
    }
    ranges = sum(t.nbytes for layer in model.moe_layers() for t in layer.ranges.longest.values())
    sizes = (before, ranges, reads.tokens, batch.accumulation)
    return DryRun(recorder.stages[1:-1], built, all_kinds, state, *sizes, names)


def _positions(count: int, kinds: list[str]) -> list[int]:
    """Return the places of the first `count - 1` blocks of each kind and of its last one."""
    return [
        place
        for place, kind in enumerate(kinds)
        if kinds[:place].count(kind) < count - 1 or kind not in kinds[place + 1 :]
    ]


def _first_update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the moments, which the optimizer allocates in its first step."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _batch(engine: Engine) -> Batch:
    """Make a batch of the shapes of the task; its values are not read."""
    samples = engine.task.dummy_batch(engine.sequences_per_forward)
    parts = (samples.input, samples.target, samples.label_B)
    input, target, label_B = (torch.empty(p.shape, dtype=p.dtype) for p in parts)
    valid_BS = None if samples.valid_BS is None else torch.ones_like(target, dtype=torch.bool)
    data, position_BS = engine.config.data, samples.position_BS
    masks = data.document_mask
    if masks is None:
        masks = data.format == "instruct" or masks_by_default(data.source)
    if masks and not _is_table(engine.config):
        position_BS = torch.empty(target.shape, dtype=torch.int64)
    return Batch(input, target, label_B, 0, 0, position_BS, valid_BS)


def _watch_stages(model: nn.Module, recorder: StepRecorder) -> None:
    """Mark the stages of a step.

    A block's backward begins with the gradient of its output, which is the input of the next.
    """

    def mark_at_gradient(tensor: Any, name: str) -> None:
        tensor.register_hook(lambda grad: recorder.mark(name))

    def begin(index: int, module: nn.Module, inputs: Any) -> None:
        if recorder.in_backward:
            return  # a block that is computed again
        recorder.mark(f"forward {index}")
        if isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            after = f"backward {index - 1}" if index else "embedding backward"
            mark_at_gradient(inputs[0], after)

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        if not recorder.in_backward:
            recorder.mark("head")
            first = output[0] if isinstance(output, tuple) else output
            mark_at_gradient(first, f"backward {len(every) - 1}")

    every = list(blocks(model))
    for index, block in enumerate(every):
        block.register_forward_pre_hook(partial(begin, index), prepend=True)
    if every:
        every[-1].register_forward_hook(end)
