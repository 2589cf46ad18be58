"""Configs that are refused: one table for the drivers in process and for the real command.

Drivers: `test_refusals.py` (all, in process), `tests/cli/test_bad_input.py` (a sample with the real
command), `tests/drills/test_config_attacks.py` (the attacks with the real command).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MACROS = {
    "@table": "train.task=classification data.source=sklearn:digits",
    "@gated": (
        "data.streams=[pixels,strokes] model.fusion=gated moe.router.kind=fixed "
        "moe.top_k=1 moe.num_experts=2"
    ),
    "@budget": "moe.router.kind=budget moe.router.renormalize=false",
    "@expert_choice": "moe.router.kind=expert_choice moe.router.allow_future_leak=true",
    "@adaptive": "moe.router.kind=adaptive moe.router.renormalize=false",
    "@groups": "moe.router.kind=group_limited moe.router.groups=4",
    "@workload": "moe.router.kind=workload moe.router.workload=W2",
    "@soft": "moe.router.kind=soft moe.top_k=8",
    "@shapes": "moe.experts.shapes=[[],[50],[64,32]] moe.num_experts=3",
    "@next": "moe.capacity.overflow=next_choice moe.capacity.factor=1.0",
}
"""Settings that several rows have."""
TABLE = r"""
# classification
@table data.source=stdlib | data.source | data.source=stdlib: must be one of sklearn:digits
@table data.source=sklearn:digit | data.source | use sklearn:digits
@table data.streams=[pixels,sound]
    | data.streams | holds sound, but sklearn:digits has pixels, profiles, strokes
@table data.streams=[pixels,pixels] | data.streams | holds pixels twice
@table @gated data.streams=[pixels] | model.fusion | model.fusion=gated: joins two streams or more
@table @gated moe.router.kind=top_k
    | moe.router.kind | moe.router.kind=top_k: must be fixed for model.fusion=gated
@table @gated moe.top_k=2 | moe.top_k | moe.top_k=2: must be 1 for model.fusion=gated
@table @gated moe.num_experts=3
    | moe.num_experts | moe.num_experts=3: must be the number of data.streams, 2
@table @gated model.head=experts | model.head | model.head=experts: must be linear
@table moe.router.kind=fixed
    | moe.router.kind | routes by a label of the sample, which is the answer
@table moe.router.kind=hash | moe.router.kind | routes by the ids of tokens
@table model.stream_dropout=0.3 | model.stream_dropout | model.stream_dropout=0.3: needs two streams
@table @gated model.stream_dropout=1.5
    | model.stream_dropout | model.stream_dropout=1.5: must be between 0 and 1
@table model.head=experts moe.experts.copy=1
    | moe.experts.copy | moe.experts.copy=1: cannot return an input
@table data.tokenizer=x.json
    | data.tokenizer | data.tokenizer=x.json: has no meaning for train.task=classification
@table model.rope_base=500 | model.rope_base | only for language_modelling
@table model.head=experts model.layers=0 moe.num_experts=2 moe.top_k=2 moe.experts.shapes=[[64],[]]
    @budget moe.router.budget=0.01
    | moe.router.budget | less than the cheapest expert costs, 0.0676

# forced routing
@workload moe.router.workload=W8 | moe.router.workload | W8
@workload moe.router.ranks=3
    | moe.router.ranks | moe.router.ranks=3: must divide moe.num_experts=8 for W2
@workload moe.router.hot=5 | moe.router.hot | moe.router.hot=5.0: must be at most 4
@workload moe.router.workload=W5 moe.router.ranks=2 moe.top_k=5 | moe.top_k | must be at most 4
moe.router.hot=2 | moe.router.hot | has no meaning for moe.router.kind=top_k
@workload moe.balance.bias=0.1 | moe.balance.bias | moves choices by score
@workload moe.router.jitter=0.1 | moe.router.jitter | has no meaning

# a trace
tracking.trace=all | tracking.trace | all
tracking.trace=counts model.moe_every=0 | tracking.trace | needs a model with MoE layers
tracking.trace=choices @soft | tracking.trace | moe.router.kind=soft makes none
tracking.trace=scores moe.router.kind=hash | tracking.trace | kind=hash does not
@table tracking.trace=counts | tracking.trace | has no meaning for train.task=classification

# a language model reads none of it
model.fusion=gated | model.fusion | has no meaning for train.task=language_modelling
model.head=experts | model.head | has no meaning
model.stream_dropout=0.1 | model.stream_dropout | has no meaning
data.streams=[pixels] | data.streams | has no meaning
data.source=sklearn:digits | data.source | set train.task=classification
data.source=synthetic:clusters | data.source | set train.task=classification
model.layers=0 | model.layers | model.layers=0: must be 1 or more

# numbers beyond any machine, names of no field
model.dim=10000000000 | model.dim | model.dim=10000000000: must be at most 1048576
model.layers=1000000 | model.layers | model.layers=1000000: must be at most 10000
moe.num_experts=100000000 | moe.num_experts | moe.num_experts=100000000: must be at most
parallel.ep=10000000000 | parallel.ep | parallel.ep=10000000000: must be at most
train.steps=1000000000000000 | train.steps | train.steps=1000000000000000: must be at most
parallel.placement.every=5 | parallel.placement.every | has no meaning
parallel.placement.from=last | parallel.placement.from | has no meaning
parallel.placement.kind=periodic parallel.placement.every=0
    | parallel.placement.every | must be 1 or more
@shapes parallel.placement.kind=periodic
    | parallel.placement.kind | periodic & experts of one shape only & use fixed
model.moe_every=0 parallel.placement.kind=periodic
    | parallel.placement.kind | needs a model with MoE layers
modular.bank=low_rank parallel.placement.kind=periodic
    | parallel.placement.kind | not the modules of bank=low_rank
parallel.placement.copies=some | parallel.placement.copies | must be auto or a number & copies=auto
parallel.placement.copies=-1 | parallel.placement.copies | must not be negative
parallel.placement.break_even=9 | parallel.placement.break_even | has no meaning
@shapes parallel.placement.copies=2 | parallel.placement.copies | one shape only & use 0
modular.bank=low_rank parallel.placement.copies=2
    | parallel.placement.copies | not the modules of bank=low_rank
moe.exchange=padded moe.capacity.factor=1 parallel.placement.copies=auto
    | parallel.placement.copies | saves nothing with moe.exchange=padded & use packed
moe.experts.kind=own.py:Mine parallel.placement.copies=2
    | parallel.placement.copies | needs dmoe's own experts, not own.py:Mine
parallel.exchange.overlap=true moe.capacity.factor=1 moe.capacity.pool=2
    | parallel.exchange.overlap | does not work with pooled slots & use false
parallel.exchange.overlap=true parallel.placement.copies=2
    | parallel.exchange.overlap | does not work with copies for the step
parallel.exchange.overlap=true modular.bank=low_rank
    | parallel.exchange.overlap | needs dmoe's own MoE layers
parallel.exchange.overlap=true model.moe_every=0
    | parallel.exchange.overlap | needs a model with MoE layers
parallel.exchange.once_per_rank=true moe.capacity.factor=1 moe.exchange=padded
    | parallel.exchange.once_per_rank | needs moe.exchange=packed & use false
parallel.exchange.once_per_rank=true parallel.exchange.overlap=true
    | parallel.exchange.once_per_rank | works with neither overlap
parallel.exchange.once_per_rank=true parallel.placement.copies=2
    | parallel.exchange.once_per_rank | nor parallel.placement.copies
parallel.exchange.once_per_rank=true moe.top_k=1 moe.router.renormalize=false
    | parallel.exchange.once_per_rank | saves nothing with moe.top_k=1
parallel.exchange.once_per_rank=true modular.bank=low_rank
    | parallel.exchange.once_per_rank | not the modules of bank=low_rank
parallel.exchange.once_per_rank=true parallel.exchange.chunks=2
    | parallel.exchange.once_per_rank | works with neither overlap nor chunks
parallel.exchange.chunks=2 moe.capacity.factor=1 moe.capacity.pool=2
    | parallel.exchange.chunks | does not work with pooled slots & use 1
parallel.exchange.chunks=2 moe.experts.kind=own.py:Mine
    | parallel.exchange.chunks | needs experts of one shape
parallel.exchange.levels=2 parallel.exchange.chunks=2
    | parallel.exchange.levels | works with neither overlap nor chunks & use 1
parallel.exchange.levels=2 parallel.placement.copies=2
    | parallel.exchange.levels | does not work with copies
moe.kernels=triton parallel.exchange.once_per_rank=true
    | moe.kernels | does not know the rows of exchange.once_per_rank & use torch
moe.kernels=triton parallel.placement.copies=2 | moe.kernels | does not know the rows of
moe.kernels=triton modular.bank=low_rank | moe.kernels | needs dmoe's own MoE layers
parallel.exchange.library=deep_ep moe.exchange=padded moe.capacity.factor=1
    | parallel.exchange.library | needs moe.exchange=packed & use torch
parallel.exchange.library=deep_ep parallel.exchange.overlap=true
    | parallel.exchange.library | has an exchange of its own
parallel.exchange.library=deep_ep train.device=cpu
    | parallel.exchange.library | moves rows between GPUs
parallel.exchange.library=deep_ep train.precision=fp32 train.device=cuda
    | parallel.exchange.library | sends rows of bfloat16
parallel.exchange.library=deep_ep debug.collectives=true train.device=cuda train.precision=bf16
    | parallel.exchange.library | cannot be compared by debug.collectives
parallel.exchange.wire=bf16 train.precision=bf16
    | parallel.exchange.wire | saves nothing with train.precision=bf16
parallel.exchange.wire=bf16 moe.exchange=padded moe.capacity.factor=1 moe.capacity.pool=2
    | parallel.exchange.wire | does not work with padded pooled slots
parallel.timeout=1e300 | parallel.timeout | parallel.timeout=1e+300: must be at most
model.dim=1048576 moe.num_experts=65536 moe.expert_dim=1048576
    | moe.num_experts | moe.num_experts=65536: gives
model.dim=1048576 model.layers=10000 model.moe_every=0 model.heads=8192
    | model.dim | model.dim=1048576: gives
train.global_batch=100000 data.seq_len=100000000
    | train.global_batch | train.global_batch=100000: times data.seq_len
checkpoint.accept_changes=[optim,train.global_bach]
    | checkpoint.accept_changes | checkpoint.accept_changes=train.global_bach: is neither a field
    nor a section & did you mean train.global_batch?
checkpoint.accept_changes=[optim,trian]
    | checkpoint.accept_changes | checkpoint.accept_changes=trian: is neither a field nor a
    section & did you mean train?
checkpoint.accept_changes=[optim,qqqqq]
    | checkpoint.accept_changes | checkpoint.accept_changes=qqqqq: is neither a field nor a
    section & dmoe explain --fields

# capacity, balance, experts and router together
moe.balance.load=0.1 | moe.balance.load | noisy
moe.balance.load=0.1 @adaptive | moe.balance.load | noisy
moe.capacity.overflow=next_choice | moe.capacity.overflow | capacity
@next moe.num_experts=2 | moe.capacity.overflow | all of them
moe.capacity.renormalize=true moe.top_k=1 moe.router.renormalize=false
    | moe.capacity.renormalize | gradient
moe.capacity.renormalize=true @adaptive | moe.capacity.renormalize | k_min=1
@next moe.router.kind=fixed | moe.capacity.overflow | next expert
@next moe.router.kind=hash | moe.capacity.overflow | next expert
@next @soft | moe.capacity.overflow | next expert
@next @expert_choice | moe.capacity.overflow | next expert
moe.capacity.pool=2 | moe.capacity.pool | there are none & moe.capacity.factor
moe.capacity.pool=0 | moe.capacity.pool | 1 or more
moe.capacity.pool=3 moe.capacity.factor=1.0 | moe.capacity.pool | must divide moe.num_experts=8
moe.capacity.pool_floor=0.5 moe.capacity.factor=1.0 | moe.capacity.pool_floor | moe.capacity.pool
moe.capacity.pool=2 @soft moe.capacity.factor=1.0 | moe.capacity.pool | no expert overflows
moe.capacity.pool=2 @expert_choice moe.capacity.factor=1.0 | moe.capacity.pool | no expert overflows
moe.balance.bias=0.001 moe.router.kind=fixed | moe.balance.bias | router
moe.balance.bias=0.001 moe.router.kind=hash | moe.balance.bias | router
moe.balance.bias=0.001 @soft | moe.balance.bias | router
moe.balance.bias=0.001 @expert_choice | moe.balance.bias | router
moe.balance.switch=-0.1 | moe.balance.switch | must not be negative
moe.balance.z=-0.1 | moe.balance.z | must not be negative
moe.balance.importance=-0.1 | moe.balance.importance | must not be negative
moe.balance.load=-0.1 | moe.balance.load | must not be negative
moe.balance.usage_std=-0.1 | moe.balance.usage_std | must not be negative
moe.balance.pooled=-0.1 | moe.balance.pooled | must not be negative
moe.balance.pooled=0.1 | moe.balance.pooled | use moe.balance.switch
moe.balance.bias=-0.1 | moe.balance.bias | must not be negative
moe.router.kind=budget | moe.router.renormalize | weight 1
@budget moe.router.budget=0 | moe.router.budget | at most 1
@budget moe.router.budget=1.5 | moe.router.budget | at most 1
@budget moe.router.min_weight=1 | moe.router.min_weight | less than 1
@budget moe.router.budget=0.1 | moe.router.budget | 0.125 of all
@budget @shapes moe.router.budget=0.1 | moe.router.budget | nothing would ever run
@budget moe.router.per=sequence | moe.router.per | later tokens
@budget moe.capacity.renormalize=true moe.capacity.factor=1.0 | moe.capacity.renormalize | alone 1
@budget @next | moe.capacity.overflow | budget affords
@budget moe.router.score=sigmoid | moe.router.score | no meaning
moe.router.budget=0.5 | moe.router.budget | only for budget
moe.router.min_weight=0.2 | moe.router.min_weight | only for budget
moe.router.per=sequence | moe.router.per | only for budget
moe.experts.shapes=[[],[50],[64,32]] | moe.num_experts | number of moe.experts.shapes, 3
moe.num_experts=3 moe.experts.shapes=[[],[0],[5]] | moe.experts.shapes | from 1 to
moe.num_experts=3 moe.experts.shapes=[[],5,[5]] | moe.experts.shapes | lists of whole numbers
moe.num_experts=3 moe.experts.shapes=[[],[1.5],[5]] | moe.experts.shapes | lists of whole numbers
@shapes model.dense_first=1 | model.dense_dim | dense blocks
@shapes train.recompute=activation | train.recompute | of one shape & use experts or block
@shapes optim.moments=bf16 | optim.moments | does not work with moe.experts.shapes & use fp32
optim.moments=bf16 optim.offload=true | optim.offload | moments in fp32 & use optim.moments=fp32
optim.kind=muon optim.offload=true | optim.offload | only for adamw
optim.kind=muon optim.moments=bf16 | optim.moments | only for adamw
@shapes parallel.ep=2 | parallel.ep | needs 2 ranks & this is one process & --ranks 2
moe.experts.zero=-1 | moe.experts.zero | must not be negative
moe.experts.copy=1 @next | moe.capacity.overflow | no queue
moe.experts.constant=1 moe.top_k=10 | moe.top_k | 9 experts, zero-cost ones included
moe.experts.zero=1 moe.router.kind=fixed | moe.experts.zero | have no meaning
moe.experts.zero=1 moe.router.kind=hash | moe.experts.zero | have no meaning
moe.experts.zero=1 @expert_choice | moe.experts.zero | have no meaning
moe.capacity.factor=0 | moe.capacity.factor | greater than 0
moe.capacity.eval_factor=-1 | moe.capacity.eval_factor | greater than 0
moe.capacity.min_capacity=0 | moe.capacity.min_capacity | 1 or more

# one router
moe.router.jitter=1.0 | moe.router.jitter |
moe.router.jitter=-0.1 | moe.router.jitter |
moe.router.kind=fixed moe.router.jitter=0.1 | moe.router.jitter |
moe.router.kind=hash moe.router.jitter=0.1 | moe.router.jitter |
@soft moe.router.score=sigmoid | moe.router.score |
moe.router.kind=noisy moe.router.score=sigmoid | moe.router.score |
moe.router.kind=adaptive moe.router.score=sigmoid | moe.router.score |
moe.router.kind=fixed moe.router.score=sigmoid | moe.router.score |
@expert_choice moe.router.score=sigmoid | moe.router.score |
moe.router.kind=noisy moe.router.weights_from=chosen | moe.router.weights_from |
moe.router.kind=hash moe.router.weights_from=chosen | moe.router.weights_from |
moe.router.groups=4 | moe.router.groups |
moe.router.topk_groups=4 | moe.router.topk_groups |
moe.router.top_p=0.5 | moe.router.top_p |
moe.router.k_min=2 | moe.router.k_min |
moe.router.allow_future_leak=true | moe.router.allow_future_leak |
moe.router.kind=group_limited moe.router.groups=3 | moe.router.groups |
moe.router.kind=group_limited moe.router.groups=0 | moe.router.groups |
@groups moe.router.topk_groups=5 | moe.router.topk_groups |
@groups moe.router.topk_groups=0 | moe.router.topk_groups |
@groups moe.top_k=3 | moe.top_k |
@adaptive moe.router.top_p=0 | moe.router.top_p |
@adaptive moe.router.top_p=1.1 | moe.router.top_p |
moe.router.kind=adaptive moe.router.k_min=3 | moe.router.k_min |
moe.router.kind=adaptive moe.router.k_min=0 | moe.router.k_min |
moe.router.kind=adaptive | moe.router.renormalize |
@adaptive moe.router.weights_from=chosen | moe.router.weights_from |
moe.top_k=1 | moe.router.renormalize |
@groups moe.top_k=1 | moe.router.renormalize |
moe.top_k=1 moe.router.renormalize=false moe.router.weights_from=chosen | moe.router.weights_from |
moe.router.kind=noisy moe.top_k=1 moe.router.renormalize=false | moe.top_k |
moe.router.kind=soft | moe.top_k |
@soft moe.capacity.factor=0.5 | moe.capacity.factor |
@soft moe.capacity.eval_factor=0.5 | moe.capacity.eval_factor |
moe.router.kind=expert_choice | moe.router.kind |
@expert_choice moe.capacity.group=global moe.capacity.factor=1.0 | moe.capacity.group |
@expert_choice @next | moe.capacity.overflow |

# mistakes on the command line
moe.top_q=1 | moe.top_q | moe.top_q=1 & no such field & moe.top_k
mo.top_k=1 | mo | mo & no such field & moe
moe.top_k=two | moe.top_k | moe.top_k=two & must be int & default is 2
moe.exchange=sideways | moe.exchange | moe.exchange=sideways & packed or padded
optim.lr=.nan | optim.lr | optim.lr=nan & finite
moe.num_experts=9 parallel.ep=2 | moe.num_experts | moe.num_experts=9 & parallel.ep=2 & use | 2
parallel.ep=4 | parallel.ep | parallel.ep=4 & world of 2 & use one of [1, 2] | 2
moe.top_k=9 | moe.top_k | moe.top_k=9 & moe.num_experts=8 & use 8 or less
train.global_batch=9 | train.global_batch | train.global_batch=9 & multiple of the 2 & use 8 | 2

# values that YAML would misread
data.source=${oc.env:HOME} | data.source | data.source=${oc.env:HOME}: must not hold ${
optim.lr=${ | optim.lr | optim.lr=${: must not hold ${
train.sample_prompt="${a}" | train.sample_prompt | must not hold ${
data.source=\${a} | data.source | must not hold ${
data.source=??? | data.source | data.source=???: stands for a value that is missing
moe.top_k=??? | moe.top_k | moe.top_k=???: stands for a value that is missing
tracking.trackers=[1]
    | tracking.trackers | tracking.trackers=1: must be text, and YAML reads it as the number 1
train={run_dir: 12}
    | train.run_dir | train.run_dir=12: must be text, and YAML reads it as the number 12
moe.=1 | override | must look like section.field=value
moe..top_k=1 | override | must look like section.field=value
moe.top_k=*a | moe.top_k | YAML aliases are not allowed
moe.top_k=!!python/object/apply:os.system [id]
    | moe.top_k | !!python/object/apply:os.system are not allowed
train.steps=99999999999999999999 | train.steps | does not fit in 64 bits
train.steps=0x_ | train.steps | decimal
optim.lr=nan | optim.lr | optim.lr=nan: must be a finite number
optim.lr=1e400 | optim.lr | optim.lr=inf: must be a finite number
model.qk_norm=2 | model.qk_norm | model.qk_norm=2: must be true or false
moe={top_k: 1, top_k: 2} | moe | found duplicate key top_k
"""
"""One row per line: overrides | field of the error | parts of its text, joined by & | world size.

A line that begins with a space continues the row before.
"""


@dataclass(frozen=True)
class Refusal:
    """A config that is refused, and what the error says."""

    overrides: list[str]
    field: str
    words: list[str]
    world: int = 1


def _rows() -> dict[str, Refusal]:
    found = {}
    for line in TABLE.replace("\n    ", " ").splitlines():
        if not line or line.startswith("# "):
            continue
        overrides, field, words, *world = (part.strip() for part in line.split(" |"))
        text = " ".join(MACROS.get(word, word) for word in overrides.split(" "))
        parts = [word for word in words.split(" & ") if word]
        # An override begins with a name and an equals sign; the other words are part of a value.
        split = re.split(r" (?=[a-z_.]+=)", text)
        found[overrides] = Refusal(split, field, parts, *map(int, world))
    return found


REFUSALS = _rows() | {
    "a key of 3000 parts": Refusal(
        ["a" + ".a" * 3000 + "=1"], "override", ["must look like section.field=value"]
    ),
    "lists nested 3000 deep": Refusal(
        ["moe.top_k=" + "[" * 3000], "moe.top_k", ["nested more than 16 deep"]
    ),
    "bytes": Refusal(["optim.lr=\udcff"], "optim.lr", ["is not UTF-8 text"]),
    "5000 digits": Refusal(
        ["train.steps=" + "9" * 5000], "train.steps", ["a number of 5000 digits"]
    ),
    "text of 400 digits": Refusal(
        [f'train.steps="{"9" * 400}"'],
        "train.steps",
        ["train.steps=999999999999... (400 digits): must be at most"],
    ),
}
