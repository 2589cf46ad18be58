"""The reference's training step by its formulas: one number, one backward, one update.

    loss = (sum of -log p(target) over the global batch) / (number of its targets)
           + sum over MoE layers of coefficient * (mean over accumulation steps of auxiliary loss)

Nothing of `dmoe/train/step.py`, `dmoe/distributed` or accelerate is called: not the accumulation,
not the reductions, not the bias update; the clipping, the learning rate and the optimizers are
written out in `optimizer.py`. `capture.py` makes the same keys from the real step.

Letters: B sequences of the global batch, S positions per sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dmoe.config.schema import Config
from dmoe.models.base import ModelOutput
from dmoe.modular import adapter_layers
from dmoe.moe.routing import TokenContext
from dmoe.train.engine import Engine
from dmoe.verify.cases import ACCUMULATION_STEPS, NUM_STEPS
from dmoe.verify.decisions import Capture, named_biases, record_model
from dmoe.verify.naive.adapters import MAX_LABELS, num_labels
from dmoe.verify.naive.optimizer import scheduled_rate, update, whole_schedule

LOSS_NAMES = ("switch", "z", "importance", "load", "usage_std")
IGNORED_TARGET = -100


def train(engine: Engine, *, decisions: bool = False) -> Capture:
    """Train `NUM_STEPS` steps in one process with naive layers and return what they produced.

    Weights, moments and biases of `engine` are changed in place, so that it can be saved.
    """
    model, config = engine.model, engine.config
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: Capture = {f"initial/{n}": to_array(p) for n, p in model.named_parameters()}
    found |= whole_schedule(scheduled_rate, config.optim)
    data = engine.task.open_data().train
    model.train()
    for step in range(NUM_STEPS):
        samples = _samples(engine, data, step)
        found |= {f"{part}/{step}/{a}": to_array(t) for part, a, t in _listed(samples)}
        with record_model(model, found, step, decisions=decisions):
            loss, outputs = _forward(engine, samples, step)
            auxiliary = _auxiliary_total(outputs, config)
            routers = {n: p for n, p in named.items() if ".router." in n}
            found |= _auxiliary_gradients(auxiliary, routers, step)
            gradients = dict(
                zip(
                    named,
                    torch.autograd.grad(
                        loss / _num_targets(samples) + auxiliary,
                        list(named.values()),
                        allow_unused=True,
                    ),
                    strict=True,
                )
            )
        present = {n: g.detach() for n, g in gradients.items() if g is not None}
        found[f"loss/{step}"] = np.array(float(loss.detach()))
        found |= _sums_over_outputs(outputs, step)
        found |= {f"gradient/{step}/{n}": to_array(g) for n, g in present.items()}
        found |= update(engine, {n: named[n] for n in present}, present, step)
        found |= _bias_update(engine, outputs)
        found |= {f"bias/{step}/{n}": to_array(b) for n, b in named_biases(model)}
        found |= {f"weights/{step}/{n}": to_array(p) for n, p in model.named_parameters()}
    return found


def _samples(engine: Engine, data: object, step: int) -> list[dict[str, Tensor]]:
    """Read the global batch at once and cut it into accumulation steps."""
    total = engine.config.train.global_batch
    batch = engine.task.training_samples(data, step, 0, total, total)
    size = total // ACCUMULATION_STEPS
    label_B = torch.arange(total) % num_labels(engine.config, MAX_LABELS)
    parts = []
    for a in range(ACCUMULATION_STEPS):
        rows = slice(a * size, (a + 1) * size)
        part = {"input": batch.input[rows], "target": batch.target[rows], "label": label_B[rows]}
        optional = {"position": batch.position_BS, "valid": batch.valid_BS}
        parts.append(part | {n: value[rows] for n, value in optional.items() if value is not None})
    return parts


def _listed(samples: list[dict[str, Tensor]]) -> Iterator[tuple[str, int, Tensor]]:
    for a, part in enumerate(samples):
        for name, value in part.items():
            yield name, a, value


def _num_targets(samples: list[dict[str, Tensor]]) -> int:
    return sum(int((part["target"] != IGNORED_TARGET).sum()) for part in samples)


def _forward(
    engine: Engine, samples: list[dict[str, Tensor]], step: int
) -> tuple[Tensor, list[ModelOutput]]:
    """Return the summed cross-entropy of the global batch, and the output of each forward."""
    outputs, losses, first = [], [], 0
    for part in samples:
        sequences, length = part["target"].shape
        context = TokenContext(
            label_T=part["label"].repeat_interleave(length),
            position_T=part["position"].flatten() if "position" in part else None,
            valid_T=part["valid"].flatten() if "valid" in part else None,
            noise_key=(engine.config.train.seed, step),
            first_sequence=first,
        )
        first += sequences
        output = engine.model(part["input"], None, context)
        outputs.append(output)
        logit_TV, target_T = output.logits.flatten(0, 1), part["target"].flatten()
        real_T = target_T != IGNORED_TARGET
        picked_T = logit_TV[real_T].gather(1, target_T[real_T].unsqueeze(1)).squeeze(1)
        losses.append((torch.logsumexp(logit_TV[real_T], 1) - picked_T).sum())
    return torch.stack(losses).sum(), outputs


def _auxiliary_total(outputs: list[ModelOutput], config: Config) -> Tensor:
    """Return the weighted auxiliary losses: summed over layers, mean over accumulation steps."""
    balance = config.moe.balance
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        for layer in (*output.aux, *output.module_aux):
            for name, value in layer.items():
                total = total + getattr(balance, name) * value / len(outputs)
    return total


def _auxiliary_gradients(total: Tensor, routers: dict[str, nn.Parameter], step: int) -> Capture:
    """Return the part of the routers' gradients that comes from auxiliary losses."""
    if not (total.requires_grad and routers):
        return {}
    parts = torch.autograd.grad(total, list(routers.values()), allow_unused=True, retain_graph=True)
    named = zip(routers, parts, strict=True)
    return {f"auxiliary_part/{step}/{n}": to_array(g) for n, g in named if g is not None}


def _sums_over_outputs(outputs: list[ModelOutput], step: int) -> Capture:
    """Return counts, summed over accumulation steps, and auxiliary losses, their mean."""
    found: Capture = {}
    for kind in ("", "modules/"):
        stats = [o.module_stats if kind else o.stats for o in outputs]
        aux = [o.module_aux if kind else o.aux for o in outputs]
        for n in range(len(stats[0])):
            pairs = [torch.stack([s[n].choice_E, s[n].kept_E]).double() for s in stats]
            found[f"counts/{step}/{kind}{n}"] = to_array(torch.stack(pairs).sum(0))
            for name in aux[0][n]:
                values = [float(a[n][name].detach()) for a in aux]
                found[f"aux/{step}/{kind}{n}/{name}"] = np.array(sum(values) / len(values))
    return found


def _biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((n, b) for n, b in model.named_buffers() if n.endswith("bias_E"))


def _bias_update(engine: Engine, outputs: list[ModelOutput]) -> Capture:
    """Update the selection biases: `b += u * sign(mean(c) - c)`, then `b -= mean(b)`.

    c counts the choices before drops of all forwards of the step.
    """
    balance, modular = engine.config.moe.balance, engine.config.modular
    if not balance.bias:
        return {}
    biases: list[tuple[Tensor, Tensor]] = []
    if modular.bank == "none" or modular.train == "joint":
        for n, layer in enumerate(engine.model.moe_layers()):
            count_E = torch.stack([o.stats[n].choice_E for o in outputs]).sum(0)
            biases.append((layer.balance_bias, count_E))
    if modular.bank != "none" and modular.train != "one_module":
        for n, adapter in enumerate(adapter_layers(engine.model).values()):
            count_E = torch.stack([o.module_stats[n].choice_E for o in outputs]).sum(0)
            biases += [(bias_E, count_E) for _, bias_E in _biases(adapter.router)]
    for bias_E, count_E in biases:
        counts = [int(c) for c in count_E]
        total, number = sum(counts), len(counts)
        signs = [(total > number * c) - (total < number * c) for c in counts]
        moved_E = bias_E + balance.bias * torch.tensor(signs, dtype=bias_E.dtype)
        bias_E.copy_(moved_E - moved_E.mean() if balance.recenter else moved_E)
    return {}


def to_array(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Copy a tensor to numpy."""
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = tensor.detach().cpu().numpy().copy()
    return array
