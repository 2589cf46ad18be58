"""Mutations of the product that nothing was tuned to, for `mutate.py`.

Each replaces one text of one file. `rows` are the rows of `dmoe verify` whose area is right for it;
without rows `verify` cannot see it by design, and `tests` name where the suite must.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One change of one file."""

    file: str
    """Below `dmoe/`."""
    old: str
    """Occurs exactly once."""
    new: str
    rows: str
    """Right first rows of `verify`, separated by `|`; empty if only the suite can see it."""
    settings: str = ""
    """Overrides of the config, separated by spaces."""
    tests: str = ""
    """Tests of the ordinary suite to run where `verify` is green."""


CAPACITY = "moe.capacity.factor=1.0"
GLOBAL = f"{CAPACITY} moe.capacity.group=global"
NEXT = f"{CAPACITY} moe.capacity.overflow=next_choice"
POOL = f"{CAPACITY} moe.capacity.pool=2"
NOISY = "moe.router.kind=noisy moe.balance.load=0.1"
BUDGET = (
    "moe.router.kind=budget moe.top_k=5 moe.experts.zero=1 moe.router.renormalize=false"
    " moe.router.budget=0.4"
)
LORA = "modular.bank=low_rank modular.modules=4 modular.routing=top_k modular.top_k=2"
MODULES = "layer inputs|layer outputs|module outputs|loss"
GRADIENTS = "expert gradients|router gradient|dense gradients"
CHECKPOINT = "checkpoint written here, read by 1|checkpoint written by 1, read here"
BACKWARD = "output gradients|dense gradients"

MUTATIONS = [
    # dispatch and the all-to-all
    Mutation(
        "moe/dispatch.py",
        "return grad_RD.mul_(weight_R.unsqueeze(1)), grad_weight_TK, None",
        "return grad_RD, grad_weight_TK, None",
        "expert gradients",
    ),
    Mutation(
        "moe/dispatch.py",
        "return sum_over_choices(grads[0], weight_TK, permutation), None",
        "return sum_over_choices(grads[0], None, permutation), None",
        "input gradients",
        CAPACITY,
    ),
    Mutation(
        "moe/padded_slots.py",
        "row_TK = (plan.expert_TK * groups + group_T1) * capacity + plan.slots.position_TK",
        "row_TK = (group_T1 * plan.num_experts + plan.expert_TK) * capacity"
        " + plan.slots.position_TK",
        "layer outputs",
        CAPACITY,
    ),
    Mutation(
        "distributed/all_to_all.py",
        "order_R = expert_R.sort(stable=True).indices",
        "order_R = expert_R.sort(stable=True, descending=True).indices",
        "layer outputs",
    ),
    Mutation(
        "moe/experts/one_by_one.py",
        "blocks = _Blocks(ctx.sizes, x.dtype, permutation, order_R)",
        "blocks = _Blocks(ctx.sizes, x.dtype, permutation, None)",
        "expert gradients",
    ),
    # capacity and its queues
    Mutation(
        "moe/expert_queue.py",
        "queue_N = (group_T * assignments.num_experts + assignments.expert_TK.t()).flatten()",
        "queue_N = (group_T * 0 + assignments.expert_TK.t()).flatten()",
        "dropped set",
        CAPACITY,
    ),
    Mutation(
        "moe/expert_queue.py",
        "flatten().sort(descending=True, stable=True).indices",
        "flatten().sort(descending=False, stable=True).indices",
        "dropped set",
        f"{CAPACITY} moe.capacity.priority=score",
    ),
    Mutation(
        "moe/expert_queue.py",
        "count_WKE[: comm.rank].sum(0)",
        "count_WKE[: comm.rank + 1].sum(0)",
        "dropped set",
        GLOBAL,
    ),
    Mutation(
        "moe/capacity.py",
        "wanted = math.ceil(factor",
        "wanted = math.floor(factor",
        "capacity slots",
        "moe.capacity.factor=1.1",
    ),
    Mutation(
        "moe/capacity.py",
        "return kept_TK / (kept_TK.sum(-1, keepdim=True) + 1e-20) * scale",
        "return kept_TK / (kept_TK.sum(-1, keepdim=True) + 1e-20)",
        "combine weights",
        f"{CAPACITY} moe.capacity.renormalize=true moe.router.scale=2.5",
    ),
    Mutation(
        "moe/capacity.py",
        "nth_TK = overflowed_TK.to(torch.int64).cumsum(1) - 1",
        "nth_TK = overflowed_TK.to(torch.int64).cumsum(1)",
        "dropped set",
        NEXT,
    ),
    Mutation(
        "moe/base_layer.py",
        'tokens * self.comm.size if limits.group == "global" else',
        'tokens if limits.group == "global" else',
        "capacity slots",
        GLOBAL,
    ),
    # routers and noise
    Mutation(
        "moe/routers/base.py",
        "return weight_TK if config.scale == 1.0 else weight_TK * config.scale",
        "return weight_TK",
        "combine weights",
        "moe.router.scale=2.5",
    ),
    Mutation(
        "moe/routers/budget.py",
        "left_T = left_T - cost_T * taken[-1]",
        "left_T = left_T - cost_T",
        "chosen experts",
        BUDGET,
    ),
    Mutation(
        "train/step_metrics.py",
        "sent[mesh.ep_rank] = placement",
        "sent[:, mesh.ep_rank] = placement",
        "",
        tests="tests/train/test_telemetry.py tests/train/test_telemetry_vector.py",
    ),
    Mutation(
        "distributed/data_parallel.py",
        "return nullcontext() if last or self.ddp is None else self.ddp.no_sync()",
        "return nullcontext()",
        "dense gradients",
    ),
    Mutation(
        "moe/routers/base.py",
        "self.config.jitter * (2 * uniform_TD - 1)",
        "self.config.jitter * (uniform_TD - 1)",
        "router scores",
        "moe.router.jitter=0.1",
    ),
    Mutation(
        "moe/routers/projection.py",
        "_softmax_backward_data(grad_TK, weight_TK, -1, weight_TK.dtype)",
        "_softmax_backward_data(grad_TK, weight_TK.square(), -1, weight_TK.dtype)",
        "router gradient",
    ),
    Mutation(
        "moe/routers/topk.py",
        ".topk(min(2, size), dim=-1)",
        ".topk(1, dim=-1)",
        "chosen experts",
        "moe.num_experts=8 moe.router.kind=group_limited moe.router.groups=4"
        " moe.router.topk_groups=2",
    ),
    Mutation(
        "moe/routers/noisy.py",
        "logit_TE = clean_TE + std_TE * normal_TE",
        "logit_TE = clean_TE + std_TE.detach() * normal_TE",
        "router gradient",
        NOISY,
    ),
    Mutation("moe/rng.py", "context.first_sequence + b", "b", "router scores", NOISY),
    Mutation(
        "checkpoint/rng_state.py",
        "_set(name, table[rank].clone())",
        "_set(name, table[0].clone())",
        "",
        tests="tests/checkpoint",
    ),
    Mutation(
        "moe/routers/adaptive.py",
        "device=probability_TK.device) < k_min",
        "device=probability_TK.device) < 1",
        "chosen experts",
        "moe.router.kind=adaptive moe.top_k=3 moe.router.k_min=2 moe.router.top_p=0.3"
        " moe.router.renormalize=false",
    ),
    # load balancing and counts
    Mutation(
        "moe/load_balancing/losses.py",
        "return routing.num_experts * (share_UE * mean_UE).sum(-1)",
        "return routing.expert_TK.shape[1] * (share_UE * mean_UE).sum(-1)",
        "auxiliary losses",
    ),
    Mutation(
        "train/evaluation/__init__.py",
        "index_add(0, label_T, masked(sums_T4, predicted_T))",
        "index_add(0, label_T, sums_T4)",
        "evaluation",
        tests="tests/train/test_evaluation.py",
    ),
    Mutation(
        "moe/load_balancing/losses.py",
        "(value_UE - mean_U1).square().mean(-1)",
        "(value_UE - mean_U1).square().sum(-1) / (value_UE.shape[1] - 1)",
        "auxiliary losses",
        "moe.balance.importance=0.1",
    ),
    Mutation(
        "data/order.py",
        "permute(index_N % num_sequences, num_sequences, seed, index_N // num_sequences)",
        "permute(index_N % num_sequences, num_sequences, seed, 0)",
        "",
        tests="tests/data",
    ),
    Mutation(
        "moe/load_balancing/losses.py",
        "torch.where(logit_TE >= last_T1, next_T1, last_T1)",
        "torch.where(logit_TE >= last_T1, last_T1, next_T1)",
        "auxiliary losses",
        NOISY,
    ),
    Mutation(
        "moe/load_balancing/bias.py",
        "return bias_E - bias_E.mean(-1, keepdim=True) if recenter else bias_E",
        "return bias_E",
        "bias",
        "moe.balance.bias=0.01",
    ),
    Mutation(
        "moe/metrics.py",
        "kept_E=count_per_expert(plan.expert_TK, keep_TK, 1, plan.num_experts)[0],",
        "kept_E=count_per_expert(routing.expert_TK, keep_TK, 1, plan.num_experts)[0],",
        "counts",
        NEXT,
    ),
    Mutation(
        "train/optimizer.py",
        "betas=betas, eps=config.eps, fused=True",
        "betas=betas, fused=True",
        "parameters after two steps",
        "optim.eps=1e-3",
        tests="tests/train tests/config",
    ),
    Mutation("train/reduction.py", "aux.mean(0)", "aux[-1]", "auxiliary losses"),
    Mutation(
        "distributed/fsdp.py",
        "    if not torch.is_grad_enabled():\n        cast",
        "    if torch.is_grad_enabled():\n        cast",
        "evaluation",
        tests="tests/distributed/test_fsdp.py tests/distributed/test_fsdp_state.py",
    ),
    # experts
    Mutation(
        "moe/experts/activation.py",
        "derivative(grad_RF * up, gate, grad_input=grad_gate)",
        "derivative(grad_RF, gate, grad_input=grad_gate)",
        "expert gradients",
    ),
    Mutation(
        "moe/experts/activation.py",
        "    return nonlinearity(gate).mul_(up)",
        "    return nonlinearity(up).mul_(gate)",
        "layer outputs",
    ),
    Mutation(
        "modular/banks/weight_delta.py",
        "return grouped_product(hidden_Rr, self.b, tokens_per_module) * self.scale",
        "return grouped_product(hidden_Rr, self.b, tokens_per_module)",
        MODULES,
        f"{LORA} modular.alpha=2",
    ),
    Mutation(
        "moe/experts/grouped_mlp.py",
        'normal_(self.w_out[local], out_std, seed, "expert", layer, expert, "out")',
        'normal_(self.w_out[local], out_std, seed, "expert", layer, expert, "in")',
        "initial draws",
    ),
    Mutation(
        "moe/experts/zero_cost.py",
        "first = weight_TE.shape[1] - self.num_experts + self.zero",
        "first = weight_TE.shape[1] - self.num_experts",
        "layer outputs",
        "moe.experts.zero=1 moe.experts.copy=1 moe.experts.constant=1",
    ),
    # gradients, norm, optimizer
    Mutation(
        "distributed/gradients.py",
        "        if self.sync_enabled:",
        "        if not self.sync_enabled:",
        "expert gradients",
    ),
    Mutation(
        "modular/aggregation/learned.py",
        '"ta,tka->tk", query_TA, key_TKA) / math.sqrt(self.key_dim)',
        '"ta,tka->tk", query_TA, key_TKA) / self.key_dim',
        MODULES,
        f"{LORA} modular.aggregation=attention",
    ),
    Mutation(
        "distributed/gradients.py",
        "else min(1.0, max_norm / (norm + 1e-6))",
        "else min(1.0, max_norm / (norm * norm + 1e-6))",
        "clip coefficient",
        "optim.clip=0.1",
    ),
    Mutation(
        "distributed/fsdp.py",
        "module.set_gradient_divide_factor(float(divisor))",
        "module.set_gradient_divide_factor(2.0 * divisor)",
        GRADIENTS,
    ),
    Mutation(
        "train/telemetry.py",
        "interval_tokens / seconds",
        "result.totals.num_tokens / seconds",
        "",
        tests="tests/train/test_loop.py tests/train/test_telemetry.py tests/train/test_telemetry_vector.py",
    ),
    Mutation(
        "config/schedule.py",
        "return config.lr * (step + 1) / config.warmup",
        "return config.lr * step / config.warmup",
        "learning rate",
        tests="tests/train tests/config",
    ),
    Mutation(
        "config/schedule.py",
        "return 0.5 * (1 + math.cos(math.pi * progress))",
        "return math.cos(0.5 * math.pi * progress)",
        "learning rate",
    ),
    # the step and the model
    Mutation(
        "train/step.py",
        "first = (index * process.world_size + process.rank) * count",
        "first = (process.rank * engine.batching.accumulation + index) * count",
        "samples",
    ),
    Mutation(
        "train/step.py",
        "loss = output.loss_sum / num_targets",
        "loss = output.loss_sum / num_targets * num_batches",
        "output gradients",
    ),
    Mutation(
        "models/attention.py",
        "return _rotate(grads[0], cos_S1A, -sin_S1A), None, None",
        "return _rotate(grads[0], cos_S1A, sin_S1A), None, None",
        BACKWARD,
    ),
    Mutation(
        "models/layers.py",
        ".addcmul_(wide, share, value=-1).mul_(rstd)",
        ".mul_(rstd)",
        BACKWARD,
    ),
    Mutation(
        "distributed/state_dict.py",
        'MOMENTS = ("exp_avg", "exp_avg_sq")',
        'MOMENTS = ("exp_avg",)',
        CHECKPOINT,
    ),
    # fifteen more, written before looking at what would see them
    Mutation(
        "models/attention.py",
        "self.q_norm(q_BSHA), self.k_norm(k_BSNA)",
        "self.q_norm(q_BSHA), self.q_norm(k_BSNA)",
        "dense gradients",
        "model.qk_norm=true",
    ),
    Mutation(
        "train/evaluation/__init__.py",
        "first = start + process.rank * count",
        "first = start",
        "evaluation",
        tests="tests/train/test_evaluation.py tests/distributed/test_equality.py",
    ),
    Mutation(
        "data/packing.py",
        "max(0, self.num_tokens - 1) // self.seq_len",
        "max(0, self.num_tokens) // self.seq_len",
        "",
        tests="tests/data",
    ),
    Mutation(
        "data/mixture.py",
        "block * quota_D[domain_B[position_N]] + earlier_B[position_N]",
        "earlier_B[position_N]",
        "",
        tests="tests/data",
    ),
    Mutation(
        "modular/aggregation/fixed.py",
        "sequences, tokens_per_sequence, plan.num_experts).sum(1) / routed_B1",
        "sequences, tokens_per_sequence, plan.num_experts).sum(1) / tokens_per_sequence",
        MODULES,
        tests="tests/modular",
    ),
    Mutation(
        "modular/aggregation/fixed.py",
        "modules.dispatch_and_combine(rows_TD + total_TW, kth_choice(plan, k))",
        "modules.dispatch_and_combine(rows_TD, kth_choice(plan, k))",
        MODULES,
        "modular.bank=adapter modular.modules=4 modular.routing=top_k modular.top_k=2"
        " modular.aggregation=stacked",
    ),
    Mutation(
        "train/routing_analysis.py",
        "changed = (new.chosen_TE != old_TE).any(-1).sum()",
        "changed = (new.chosen_TE != old_TE).all(-1).sum()",
        "",
        tests="tests/train/test_routing_analysis.py",
    ),
    Mutation(
        "train/checkpointer.py",
        "self.overdue |= self.config.every > 0",
        "self.overdue = self.config.every > 0",
        "",
        tests="tests/train/test_checkpoint_scheduler.py",
    ),
    Mutation(
        "moe/metrics.py",
        "share_TE = normalized(routing.score_TE)",
        "share_TE = routing.score_TE",
        "telemetry",
        "moe.router.score=sigmoid",
        tests="tests/moe/test_metrics.py tests/train/test_telemetry.py",
    ),
    Mutation(
        "models/generate.py",
        "prob_V[prob_V.cumsum(-1) - prob_V >= top_p * prob_V.sum()]",
        "prob_V[prob_V.cumsum(-1) >= top_p * prob_V.sum()]",
        "",
        tests="tests/models/test_generate.py",
    ),
    Mutation(
        "train/engine.py",
        "model.initialize(config.train.seed)",
        "model.initialize(0)",
        "",
        tests="tests/train/test_evaluation.py tests/train/test_every_field.py",
    ),
    Mutation(
        "moe/experts/activation.py",
        '"geglu": (F.gelu, aten.gelu_backward.grad_input)',
        '"geglu": (F.gelu, aten.silu_backward.grad_input)',
        "expert gradients",
        "moe.experts.kind=geglu",
    ),
    Mutation(
        "distributed/gradients.py",
        "for p in layer.router.parameters()), mesh.world_size",
        "for p in layer.router.parameters()), mesh.edp",
        "telemetry",
        tests="tests/train/test_telemetry.py tests/distributed",
    ),
    Mutation(
        "train/step.py",
        "send(batch.label_B).repeat_interleave(target.shape[1])",
        "send(batch.label_B).repeat(target.shape[1])",
        "chosen experts",
        "moe.router.kind=fixed",
    ),
    Mutation(
        "train/step_guard.py",
        "self.losses.append(loss)\n            self.bad_steps = 0",
        "self.losses.append(loss)",
        "",
        tests="tests/train/test_step_guard.py",
    ),
    # pooled slots
    Mutation(
        "moe/pooled_capacity.py",
        "positions.length_GE.clamp(max=floor)",
        "positions.length_GE",
        "dropped set",
        POOL,
    ),
    Mutation(
        "moe/pooled_capacity.py",
        "queue_positions(others, comm).global_position_TK",
        "queue_positions(others, None).global_position_TK",
        "dropped set",
        "moe.capacity.factor=0.8 moe.capacity.group=global moe.capacity.pool=2",
    ),
    Mutation(
        "moe/padded_slots.py",
        "count_Pn.cumsum(1) - count_Pn",
        "count_Pn.cumsum(1) - count_Pn.roll(1, 1)",
        "layer outputs",
        f"{POOL} moe.capacity.group=sequence",
    ),
    Mutation(
        "distributed/padded_all_to_all.py",
        "counts = torch.cat([count_Ne.sum(0), unused_R.sum().view(1)])",
        "counts = torch.cat([count_Ne.sum(0).roll(1), unused_R.sum().view(1)])",
        "layer outputs",
        POOL,
    ),
]
