"""One class of the user's own per kind that a config has, each with a reference where it can have one."""

import hashlib

import numpy as np
import torch

from dmoe.config.router_kinds import RouterSpec
from dmoe.data.corpus import Document
from dmoe.moe.experts.grouped_mlp import MLPExperts
from dmoe.moe.experts.grouped_product import grouped_linear
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routing import Routing


class Position(RouterModule):
    """Experts by the token's place in its batch; nothing is learned."""

    spec = RouterSpec(
        "the experts of the token's place in its sequence",
        frozenset(),
        learned=False,
        ranks_experts=False,
        weights_sum_to_scale=True,
    )

    def __init__(self, config, dim, num_experts, top_k, layer=0, *, offset=0):
        super().__init__(config, num_experts, top_k, layer)
        self.offset = offset

    def forward(self, x_TD, context, shape):
        place_T = torch.arange(len(x_TD)) % (len(x_TD) // shape.sequences)
        expert_TK = (place_T[:, None] + torch.arange(self.top_k) + self.offset) % self.num_experts
        weight_TK = torch.full(expert_TK.shape, 1 / self.top_k, dtype=x_TD.dtype)
        score_TE = torch.zeros(len(x_TD), self.num_experts, dtype=x_TD.dtype)
        score_TE = score_TE.scatter(1, expert_TK, weight_TK)
        return Routing(expert_TK, weight_TK, score_TE, score_TE)


class Entropy:
    """Mean entropy of the scores, per unit."""

    def __init__(self, *, scale=1.0):
        self.scale = scale

    def values(self, routing, valid_T, units):
        score_TE = routing.score_TE / routing.score_TE.sum(-1, keepdim=True)
        entropy_T = -(score_TE * (score_TE + 1e-9).log()).sum(-1)
        return self.scale * entropy_T.view(units, -1).mean(1)

    def reference(self, routing, valid_T, units):
        rows = []
        for row in routing.score_TE:
            p = row / sum(row)
            rows.append(-sum(x * torch.log(x + 1e-9) for x in p))
        size = len(rows) // units
        groups = [rows[u * size : (u + 1) * size] for u in range(units)]
        return self.scale * torch.stack([sum(group) / size for group in groups])


class Squared(MLPExperts):
    """relu(x w_in)^power w_out."""

    def __init__(self, dim, expert_dim, num_experts, out_dim, *, power=2):
        super().__init__("relu", dim, expert_dim, num_experts, out_dim)
        self.power = power

    def forward(self, rows_RD, tokens_per_expert):
        w_in, w_out = self.w_in.to(rows_RD.dtype), self.w_out.to(rows_RD.dtype)
        hidden = grouped_linear(rows_RD, w_in, tokens_per_expert).relu() ** self.power
        return grouped_linear(hidden, w_out, tokens_per_expert)

    def reference(self, e, x_TD):
        return ((x_TD @ self.w_in[e]).clamp(min=0) ** self.power) @ self.w_out[e]


class Gained(Squared):
    """Squared, times a number of each expert: learned, and fixed in a buffer."""

    def __init__(self, dim, expert_dim, num_experts, out_dim, *, power=2):
        super().__init__(dim, expert_dim, num_experts, out_dim, power=power)
        self.gain = torch.nn.Parameter(torch.empty(num_experts))
        self.register_buffer("fixed", torch.empty(num_experts))

    def forward(self, rows_RD, tokens_per_expert):
        out_RM = super().forward(rows_RD, tokens_per_expert)
        gain_e = (self.gain * self.fixed).to(out_RM.dtype)
        gain_R = gain_e.repeat_interleave(tokens_per_expert, output_size=len(out_RM))
        return out_RM * gain_R.unsqueeze(1)

    def slice_experts(self, first, count):
        super().slice_experts(first, count)
        self.gain = torch.nn.Parameter(self.gain.detach()[first : first + count].clone())
        self.fixed = self.fixed[first : first + count].clone()

    def initialize(self, seed, layer, std, out_std):
        super().initialize(seed, layer, std, out_std)
        ids = torch.arange(self.first, self.first + len(self.gain), device=self.gain.device)
        with torch.no_grad():
            self.gain.copy_(1 + ids)
            self.fixed.copy_(2 + 3 * ids)


class Sawtooth:
    """The peak at every `period`-th step, falling to 0 between."""

    def __init__(self, optim, steps, *, period=4):
        self.peak, self.period = optim.lr, period

    def rate(self, step):
        return self.peak * (1 - (step % self.period) / self.period)

    def reference(self, step):
        while step >= self.period:
            step -= self.period
        return self.peak * (self.period - step) / self.period


class Lion(torch.optim.Optimizer):
    """Sign of the interpolated momentum (Chen et al. 2023)."""

    MOMENTS = ("momentum",)

    def __init__(self, groups, lr, *, beta1=0.9, beta2=0.99):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.beta1, self.beta2 = beta1, beta2

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["momentum"] = torch.zeros_like(p)
                state["step"] += 1
                update = (state["momentum"] * self.beta1 + p.grad * (1 - self.beta1)).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update * -group["lr"])
                state["momentum"].mul_(self.beta2).add_(p.grad * (1 - self.beta2))

    def reference(self, weight, gradient, state, group):
        before = state.get("momentum", torch.zeros_like(weight))
        state["step"] = state.get("step", torch.zeros(())) + 1
        state["momentum"] = self.beta2 * before + (1 - self.beta2) * gradient
        sign = torch.sign(self.beta1 * before + (1 - self.beta1) * gradient)
        return weight - group["lr"] * (group["weight_decay"] * weight + sign)


class Nibbles:
    """Two ids per byte: 1 + its high and 1 + its low half; 0 separates."""

    name, vocab_size, separator = "nibbles", 33, 0
    token_bytes = np.array([0] + [0] * 16 + [1] * 16)
    fingerprint = hashlib.sha256(b"nibbles").hexdigest()

    def encode(self, data):
        byte = np.frombuffer(data.replace(b"\0", b""), np.uint8).astype(np.int64)
        return np.stack([1 + byte // 16, 17 + byte % 16], 1).ravel()

    def decode(self, ids):
        ids = [i for i in ids if i]
        pairs = zip(ids[::2], ids[1::2], strict=False)
        return bytes(((a - 1) % 16) * 16 + (b - 17) % 16 for a, b in pairs).decode(
            "utf-8", "replace"
        )


class Squares:
    """Documents of square numbers."""

    def __init__(self, *, count=40):
        self.count = count

    def documents(self):
        for n in range(self.count):
            text = " ".join(str(n * i * i) for i in range(1, 200))
            yield Document(text.encode(), f"{n}.txt", "squares")


class Broken:
    """Raises when it is made."""

    def __init__(self, *arguments, **options):
        raise ZeroDivisionError("made nothing")


NO_CLASS = 3
