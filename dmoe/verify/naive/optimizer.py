"""Clipping, learning rate, AdamW and Muon by their formulas, one parameter at a time.

Nothing of `dmoe/train/optimizer.py`, `dmoe/distributed/optimizers/` or torch's is called.
The lists of decayed parameters and of Muon's are written out. The Newton-Schulz iteration is
applied to singular values: the matrix itself is never multiplied by its transpose.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from dmoe.config.plugins import parse
from dmoe.config.schema import Config, OptimConfig
from dmoe.train.engine import Engine
from dmoe.verify.decisions import Capture
from dmoe.verify.naive.plugins import own_rate, own_update

DECAYED = (
    r"attention\.w_qkv\.weight",
    r"attention\.w_out\.weight",
    r"(feed_forward|shared)\.w_(in|out)\.weight",
    r"experts\.w_(in|out)",
    r"experts\.\d+\.w\d+",
    r"fusion\.projections?(\.\d+)?\.weight",
    r"fusion\.gate",
    r"(^|\.)(output|head)\.weight",
    r"modular\.experts\.(a|b|up|down|value)",
    r"modular\.aggregation\.(projection|gate|query_weight|key_weight|value_weight)",
)
"""The parameters with weight decay, by the end of their name: matrices of attention, feed-forwards,
experts, fusion, adapters and the output. No other has any: vectors, norms, embeddings, routers,
constant experts, scaling modules, prompts."""
UNDECAYED = r"norm|embed_tokens|embeddings|\.(gate|router)\.|bias|A_log"
"""Of a published model, parts of the names of parameters without weight decay, beside vectors."""
MUONS = (
    r"attention\.w_qkv\.weight",
    r"attention\.w_out\.weight",
    r"(feed_forward|shared)\.w_(in|out)\.weight",
    r"experts\.w_(in|out)",
    r"experts\.\d+\.w\d+",
)
"""The parameters that Muon updates, by the end of their name."""


def whole_schedule(rate: Callable[[int, int, OptimConfig], float], optim: OptimConfig) -> Capture:
    """Return the learning rates of a run of twenty steps with a warm-up, by `rate`."""
    rates = [rate(step, 20, replace(optim, warmup=3)) for step in range(20)]
    return {"learning_rate/0, of a whole run with a warm-up": np.array(rates)}


def scheduled_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of optimizer step `step` of `steps`, by the documented schedule."""
    if parse(config.schedule) is not None:
        return own_rate(step, steps, config)
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    floor = config.lr * config.min_lr_ratio
    start = config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse_sqrt":
        return max(floor, config.lr * math.sqrt(max(1, config.warmup) / (step + 1)))
    if config.schedule == "wsd":
        start = max(start, round(steps - steps * config.decay_fraction))
    if step < start:
        return config.lr
    done = min(1.0, (step - start) / max(1, steps - 1 - start))
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return floor + (config.lr - floor) * left


def is_decayed(name: str) -> bool:
    """Return True for a parameter with weight decay."""
    if name.startswith("hf."):  # of a published model: the matrices, and stacks of matrices
        return not re.search(UNDECAYED, name)
    return any(re.search(rf"{pattern}$", name) for pattern in DECAYED)


def update(
    engine: Engine, named: dict[str, nn.Parameter], gradients: dict[str, Tensor], step: int
) -> Capture:
    """Clip and take one step of the optimizer in place."""
    config, optimizer = engine.config.optim, engine.optimizer
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
    clip = 1.0 if config.clip is None else min(1.0, config.clip / (norm + 1e-6))
    rate = scheduled_rate(step, engine.config.train.steps, config)
    if parse(config.kind) is not None:
        own_update(optimizer, named, {n: g * clip for n, g in gradients.items()}, rate)
        named = {}
    for name, parameter in named.items():
        decay = config.weight_decay
        own = next((v for p, v in config.groups.items() if fnmatchcase(name, p)), {})
        decay = own.get("weight_decay", decay if is_decayed(name) and parameter.ndim > 1 else 0.0)
        own_rate = rate * own.get("lr", config.lr) / config.lr
        state, gradient = optimizer.state[parameter], gradients[name] * clip
        with torch.no_grad():
            if config.kind == "muon" and is_muons(name):
                direction = _muon(
                    state, gradient, config, _parts(name, gradient.shape, engine.config)
                )
            else:
                direction = _adamw(state, gradient, config, step + 1)
                if config.moments == "bf16":
                    key = (engine.config.train.seed, "moments", name)
                    for moment, shift in (("exp_avg", 16), ("exp_avg_sq", 40)):
                        state[moment] = _rounded(state[moment], key, step + 1, shift)
            parameter.copy_(parameter - own_rate * decay * parameter - own_rate * direction)
            state["step"] = torch.tensor(float(step + 1))
    return {
        f"norm/{step}": np.array(norm),
        f"clip/{step}": np.array(clip),
        f"learning_rate/{step}": np.array(rate),
    }


def _adamw(state: dict[str, Tensor], gradient: Tensor, config: OptimConfig, t: int) -> Tensor:
    """Return the direction of AdamW (Loshchilov and Hutter 2019, algorithm 2)."""
    zero = torch.zeros_like(gradient)
    first = config.beta1 * state.get("exp_avg", zero).to(gradient) + (1 - config.beta1) * gradient
    second = config.beta2 * state.get("exp_avg_sq", zero).to(gradient)
    second = second + (1 - config.beta2) * gradient**2
    state["exp_avg"], state["exp_avg_sq"] = first, second
    corrected = torch.sqrt(second / (1 - config.beta2**t))
    return (first / (1 - config.beta1**t)) / (corrected + config.eps)


def _rounded(value: Tensor, key: tuple[object, ...], step: int, shift: int) -> Tensor:
    """Return the value in bfloat16, rounded by random bits of each element's index."""
    start = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    start = ((start >> 1) + step * 0xBF58476D1CE4E5B9) % 2**64
    x = np.arange(value.numel(), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(bits))) * np.uint64(factor)
    random = (x >> np.uint64(shift)) % np.uint64(2**16)
    wide = value.float().contiguous().view(-1).numpy().view(np.uint32)
    low, unit = wide % 2**16, np.uint32(2**16)
    rounded = wide - low + unit * (low.astype(np.uint64) + random >= 2**16)
    return torch.from_numpy(rounded.astype(np.uint32).view(np.float32)).view_as(value).bfloat16()


def is_muons(name: str) -> bool:
    """Return True for a parameter that Muon updates: a matrix that no head of experts holds."""
    return not name.startswith("head.") and any(re.search(f"{p}$", name) for p in MUONS)


def _parts(name: str, shape: torch.Size, config: Config) -> list[tuple[int, int, int]]:
    """Return the matrices side by side: along the outputs, which an expert has last.

    Query, key and value; gate and up of a gated activation, which is in front of every matrix of
    an expert but the first.
    """
    model, experts = config.model, config.moe.experts
    expert = re.search(r"experts\.(\d+)\.w(\d+)$", name)
    dim, ends = (len(shape) - 1 if "experts." in name else 0), list[int]()
    if name.endswith("w_qkv.weight"):
        width = model.head_dim or model.dim // model.heads
        queries, keys = width * model.heads, width * (model.kv_heads or model.heads)
        ends = [queries, queries + keys]
    elif experts.kind in ("swiglu", "geglu"):
        is_in = "w_in" in name
        if expert is not None:
            is_in = int(expert[2]) < len(experts.shapes[int(expert[1])])
        ends = [shape[dim] // 2] if is_in else []
    bounds = [0, *ends, shape[dim]]
    if len(shape) == 3:
        dim -= 1
    return [(dim, a, b) for a, b in pairwise(bounds)]


def _muon(
    state: dict[str, Tensor],
    gradient: Tensor,
    config: OptimConfig,
    parts: list[tuple[int, int, int]],
) -> Tensor:
    """Return the direction of Muon (Jordan et al. 2024), matrix by matrix.

    Args:
        state: of the parameter; its momentum is replaced.
        gradient: of a matrix, or of a stack of matrices.
        config: gives the decay of the momentum.
        parts: dimension, first and last + 1 index of each matrix that shares the parameter.
    """
    mu, before = config.momentum, state.get("momentum_buffer", torch.zeros_like(gradient))
    state["momentum_buffer"] = mu * before + (1 - mu) * gradient
    ahead = mu * state["momentum_buffer"] + (1 - mu) * gradient
    direction = torch.zeros_like(gradient)
    for e in range(len(ahead) if ahead.ndim == 3 else 1):
        matrix, out = (ahead[e], direction[e]) if ahead.ndim == 3 else (ahead, direction)
        for dim, start, stop in parts:
            part = matrix.narrow(dim, start, stop - start)
            factor = 0.2 * math.sqrt(max(part.shape))
            out.narrow(dim, start, stop - start).copy_(factor * _orthogonalised(part))
    return direction


def _orthogonalised(matrix: Tensor) -> Tensor:
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    s = singular / (torch.sqrt((singular**2).sum()) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    orthogonal: Tensor = left @ torch.diag(s) @ right
    return orthogonal
