"""Fifty mutations of the product that nothing was tuned to, for `mutate.py`.

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
NOISY = "moe.router.kind=noisy moe.balance.load=0.1"
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
        "return _sum_over_choices(grads[0], weight_TK, permutation), None",
        "return _sum_over_choices(grads[0], weight_TK, permutation) / 2, None",
        "input gradients",
    ),
    Mutation(
        "moe/dispatch.py",
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
        "distributed/all_to_all.py",
        "return grad, None, None, None, None",
        "return grad / 2, None, None, None, None",
        "expert gradients|input gradients",
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
        "moe/layer.py",
        'tokens * self.comm.size if limits.group == "global" else',
        'tokens if limits.group == "global" else',
        "capacity slots",
        GLOBAL,
    ),
    # routers and noise
    Mutation(
        "moe/routers/base.py",
        "    return weight_TK * config.scale\n\n\ndef with_next_experts",
        "    return weight_TK\n\n\ndef with_next_experts",
        "combine weights",
        "moe.router.scale=2.5",
    ),
    Mutation(
        "moe/routers/base.py",
        "else logit_TE.sigmoid()",
        "else (logit_TE / 1.1).sigmoid()",
        "router scores",
        "moe.router.score=sigmoid",
    ),
    Mutation(
        "moe/routers/base.py",
        "order_TE = sort_experts(score_TE.detach() + self.bias_E, eligible_TE)",
        "order_TE = sort_experts(score_TE.detach() - self.bias_E, eligible_TE)",
        "chosen experts",
        "moe.balance.bias=0.1",
    ),
    Mutation(
        "moe/routers/base.py",
        "return score_TE.sort(dim=-1, descending=True, stable=True).indices",
        "last = score_TE.shape[-1] - 1\n"
        "    return last - score_TE.flip(-1).sort(dim=-1, descending=True, stable=True).indices",
        "chosen experts",
    ),
    Mutation(
        "moe/routers/base.py",
        "self.config.jitter * (2 * uniform_TD - 1)",
        "self.config.jitter * (uniform_TD - 1)",
        "router scores",
        "moe.router.jitter=0.1",
    ),
    Mutation(
        "moe/routers/base.py",
        "weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)",
        "weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True).detach() + 1e-20)",
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
        "moe/rng.py",
        "seed, purpose, step, layer, context",
        "seed, purpose, 0, layer, context",
        "router scores",
        NOISY,
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
        "moe/load_balancing/losses.py",
        "logit_TE.logsumexp(-1, keepdim=True).square()",
        "logit_TE.logsumexp(-1, keepdim=True).abs()",
        "auxiliary losses",
        "moe.balance.z=0.01",
    ),
    Mutation(
        "moe/load_balancing/losses.py",
        "(value_UE - mean_U1).square().mean(-1)",
        "(value_UE - mean_U1).square().sum(-1) / (value_UE.shape[1] - 1)",
        "auxiliary losses",
        "moe.balance.importance=0.1",
    ),
    Mutation(
        "moe/load_balancing/losses.py",
        "else total[:num_experts] + prior_E",
        "else total[:num_experts]",
        "auxiliary losses",
        "moe.balance.switch_level=global",
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
        "direction_E = (count_E.sum(-1, keepdim=True) - num_experts * count_E).sign()",
        "direction_E = (num_experts * count_E - count_E.sum(-1, keepdim=True)).sign()",
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
        "moe/metrics.py",
        "self.choice_E.double(), self.kept_E.double()",
        "self.choice_E.to(torch.int16).double(), self.kept_E.double()",
        "",
        tests="tests/verify/test_large_counts.py",
    ),
    Mutation("train/reduction.py", "aux.mean(0)", "aux[-1]", "auxiliary losses"),
    Mutation("train/reduction.py", "stats.sum(0)", "stats[0] + stats[-1]", "counts"),
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
        "moe/experts/grouped_mlp.py",
        "expert = self.first + local",
        "expert = local",
        "initial weights",
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
        "distributed/gradients.py",
        "1.0 if isinstance(g, DTensor) else 1.0 / replicas",
        "1.0 if isinstance(g, DTensor) else 1.0",
        "global norm",
    ),
    Mutation(
        "distributed/gradients.py",
        "factor = min(1.0, max_norm / (norm + 1e-6))",
        "factor = min(1.0, max_norm / (norm * norm + 1e-6))",
        "clip coefficient",
        "optim.clip=0.1",
    ),
    Mutation(
        "distributed/data_parallel.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0)",
        GRADIENTS,
    ),
    Mutation(
        "train/engine.py",
        '    "embedding",\n',
        "",
        "parameters after two steps",
    ),
    Mutation(
        "train/engine.py",
        "betas=(config.beta1, config.beta2)",
        "betas=(config.beta2, config.beta1)",
        "Adam's moments",
    ),
    Mutation(
        "train/engine.py",
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
        "loss = output.loss_sum / engine.targets_per_step",
        "loss = output.loss_sum / engine.targets_per_step * num_batches",
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
        "grad_x = (grad * weight).sub_(normed.mul_(mean)).mul_(rstd)",
        "grad_x = (grad * weight).mul_(rstd)",
        BACKWARD,
    ),
    Mutation(
        "distributed/state_dict.py",
        'MOMENTS = ("exp_avg", "exp_avg_sq")',
        'MOMENTS = ("exp_avg",)',
        CHECKPOINT,
    ),
]
