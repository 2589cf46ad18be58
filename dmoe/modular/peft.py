"""Low-rank modules in the format of Hugging Face's `peft`: export and import.

    peft's lora_A.weight [r, D] = A_m^T     lora_B.weight [O, r] = B_m^T     scaling = alpha / r

A folder (adapter_config.json, adapter_model.safetensors) is one module of every target. Settings
that `LoRA` does not support are refused, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.modular.aggregation import WeightedSum
from dmoe.modular.attach import AggregationMaker, adapter_layers, attach
from dmoe.modular.banks.base import AdapterBank
from dmoe.modular.banks.weight_delta import LoRA
from dmoe.modular.layer import AdapterLayer
from dmoe.modular.routing import RouterMaker, constant

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<target>.+)\.lora_(?P<side>[AB])\.weight")
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
"""Settings that change what an adapter computes and that `LoRA` lacks: they must be off."""
SAFE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that initialize the factors only. The others (pissa, olora, loftq,
corda, ...) subtract the factors' product from the base model's weights when peft creates or loads
the adapter, so the adapter belongs to another base model than the one it names."""


@dataclass(frozen=True)
class PeftAdapter:
    """One LoRA adapter as saved by peft."""

    rank: int
    alpha: float
    """The product is scaled by alpha / rank; rank-stabilized adapters are converted."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """A [D, r] and B [r, O] per target module."""


def export_peft(
    model: nn.Module,
    module: int,
    folder: str | Path,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write one module of every target so that `peft.PeftModel.from_pretrained` loads it.

    The router is not exported: peft applies a module to every token.

    Args:
        model: a network with LoRA modules beside Linear targets.
        module: id of the module.
        folder: output folder.
        base_model: name of the base model, for the config.
        task_type: peft's task type, e.g. CAUSAL_LM, for the config.

    Raises:
        ConfigError: for other banks or targets, or if rank or alpha differ between targets.
    """
    banks = {name: layer.experts for name, layer in adapter_layers(model).items()}
    rank, alpha = _common_rank_and_alpha(banks)
    tensors = {}
    for name, bank in banks.items():
        assert isinstance(bank, LoRA)
        target = model.get_submodule(name)
        if not isinstance(target, nn.Linear) or not name:
            what = (
                f"{name} is a {type(target).__name__}" if name else "the model itself has no name"
            )
            allowed = f"{what}, and peft finds Linear modules by name"
            raise ConfigError("export", name, allowed, "attach LoRA to such modules")
        if not 0 <= module < bank.num_modules or not bank.holds_all_modules:
            allowed = f"must be one of 0 to {bank.num_modules - 1}, on a rank that holds all"
            raise ConfigError("module", module, allowed, "name one of them")
        prefix = f"base_model.model.{name}"
        for side, factor in (("A", bank.a[module]), ("B", bank.b[module])):
            tensors[f"{prefix}.lora_{side}.weight"] = factor.detach().t().contiguous().cpu()
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model, sorted(banks)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / WEIGHTS, {"format": "pt"})
    (Path(folder) / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _common_rank_and_alpha(banks: Mapping[str, AdapterBank]) -> tuple[int, float]:
    kinds = {type(bank).__name__ for bank in banks.values()}
    if kinds != {"LoRA"}:
        shown = ", ".join(sorted(kinds)) or "nothing"
        allowed = "peft's LoRA format holds LoRA modules only"
        raise ConfigError("export", shown, allowed, "attach LoRA")
    settings = {(bank.rank, bank.alpha) for bank in banks.values() if isinstance(bank, LoRA)}
    if len(settings) != 1:
        allowed = "must be the same for every target"
        raise ConfigError("rank, alpha", sorted(settings), allowed, "export one rank at a time")
    return settings.pop()


def _target_modules(model: nn.Module, targets: list[str]) -> list[str] | str:
    """Return a value of peft's `target_modules` that matches these targets and no others.

    peft matches names by their ending, so it is a pattern if a name ends another module's name too.
    """
    endings = tuple(f".{target}" for target in targets)
    if any(name.endswith(endings) and name not in targets for name, _ in model.named_modules()):
        return "|".join(map(re.escape, targets))
    return targets


def read_peft(folder: str | Path) -> PeftAdapter:
    """Read one LoRA adapter that peft saved.

    Raises: CheckpointError if a file is missing or a setting is not supported.
    """
    try:
        config: dict[str, Any] = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: holds no adapter in peft's format with safetensors ({error})"
        ) from None
    if problem := _unsupported_setting(config):
        raise CheckpointError(f"{folder}: {problem}")
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = TENSOR_NAME.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{folder}: {key} is no factor of a low-rank module")
        sides.setdefault(match["target"], {})[match["side"]] = value.t()
    if incomplete := [target for target, both in sides.items() if len(both) != 2]:
        raise CheckpointError(f"{folder}: {incomplete[0]} has only one of its two factors")
    rank = int(config["r"])
    if other := [
        target
        for target, both in sides.items()
        if both["A"].shape[1] != rank or both["B"].shape[0] != rank
    ]:
        raise CheckpointError(
            f"{folder}: {other[0]} has another rank than r={rank}; all targets must have one rank"
        )
    alpha = float(config["lora_alpha"]) * (sqrt(rank) if config.get("use_rslora") else 1.0)
    factors = {target: (both["A"], both["B"]) for target, both in sides.items()}
    return PeftAdapter(rank, alpha, factors)


def _unsupported_setting(config: Mapping[str, Any]) -> str | None:
    """Return what `LoRA` does not support in an adapter's config, in words."""
    if config.get("peft_type") != "LORA":
        return f"is an adapter of type {config.get('peft_type')}; only LORA is supported"
    if wrong := [name for name in UNSUPPORTED if config.get(name)]:
        setting = f"{wrong[0]}={config[wrong[0]]}"
        return f"{setting} changes what the adapter computes and is not supported"
    if config.get("init_lora_weights", True) not in SAFE_INITS:
        return (
            f"init_lora_weights={config['init_lora_weights']} has changed the base model it was "
            "trained on; save it with peft's path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']} trains the base model's biases; only none is supported"
    return None


def import_peft(
    model: nn.Module,
    folders: Sequence[str | Path],
    router: RouterMaker | None = None,
    aggregation: AggregationMaker = WeightedSum,
) -> dict[str, AdapterLayer]:
    """Attach adapters that peft saved as the modules of one bank per target.

    Args:
        model: the base model; changed in place.
        folders: one folder per module, in this order.
        router: router over the modules. Default, for one folder only: every token, as in peft.
        aggregation: combines the modules' outputs.

    Returns:
        The new layers by the name of their target.

    Raises:
        CheckpointError: for an adapter that is not supported or does not fit the model.
        ConfigError: if adapters differ in targets, rank or alpha.
    """
    adapters = [read_peft(folder) for folder in folders]
    if len({(a.rank, a.alpha, tuple(sorted(a.factors))) for a in adapters}) != 1:
        allowed = "must agree in target modules, rank and alpha"
        fix = "import each into a bank of its own model"
        raise ConfigError("folders", list(map(str, folders)), allowed, fix)
    if router is None:
        if len(folders) != 1:
            allowed = f"must select among {len(folders)} modules"
            raise ConfigError("router", None, allowed, "give one, e.g. routed('top_k', ...)")
        router = constant(1.0)
    first = adapters[0]
    _check_fits(model, folders[0], first)
    pattern = re.compile("|".join(map(re.escape, first.factors)))
    bank = partial(LoRA, len(folders), rank=first.rank, alpha=first.alpha)
    layers = attach(model, pattern, bank, router, aggregation)
    with torch.no_grad():
        for name, layer in layers.items():
            assert isinstance(layer.experts, LoRA)
            for module, adapter in enumerate(adapters):
                a, b = adapter.factors[name]
                layer.experts.a[module].copy_(a)
                layer.experts.b[module].copy_(b)
    return layers


def _check_fits(model: nn.Module, folder: str | Path, adapter: PeftAdapter) -> None:
    modules = dict(model.named_modules())
    for name, (a, b) in adapter.factors.items():
        target, widths = modules.get(name), (len(a), b.shape[1])
        if not isinstance(target, nn.Linear) or (target.in_features, target.out_features) != widths:
            raise CheckpointError(
                f"{folder}: {name} is a Linear of {widths[0]} to {widths[1]} there, "
                "and none of the model's"
            )
