"""Low-rank modules in the format of Hugging Face's `peft`, out and in: adapter_config.json and adapter_model.safetensors.

    their lora_A.weight [r, D] = our A_m^T        their lora_B.weight [O, r] = our B_m^T        their scaling = alpha / r, as ours

One folder is one module of every place. What peft's format can say and `LowRank` cannot mean is refused, never dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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
from dmoe.modular.attach import AggregationMaker, attach, adapter_layers
from dmoe.modular.banks.weight_delta import LowRank
from dmoe.modular.layer import AdapterLayer
from dmoe.modular.routing import RouterMaker, constant

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<place>.+)\.lora_(?P<side>[AB])\.weight")
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
"""Settings that change what an adapter computes and that `LowRank` has no counterpart of: they must be off."""
SAFE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`, what draws the factors alone. The others (pissa, olora, loftq, corda, ...) subtract their product from the
core's weights when peft makes or loads the adapter, so it belongs to another core than the one it names."""


@dataclass(frozen=True)
class PeftAdapter:
    rank: int
    alpha: float
    """The product is scaled by alpha / rank; rank-stabilised adapters are converted."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """For each place A [D, r] and B [r, O]."""


def export_peft(
    model: nn.Module,
    module: int,
    folder: str | Path,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write module `module` of every place into a folder that `peft.PeftModel.from_pretrained(bare model, folder)` loads.

    `base_model` and `task_type` (e.g. CAUSAL_LM) are written into the config as they are. The router is not exported: peft applies a
    module to every token. Raises: ConfigError where a bank is not LowRank or not beside a Linear, or ranks or alphas
    differ between places.
    """
    found = adapter_layers(model)
    banks = {name: layer.experts for name, layer in found.items()}
    kinds = {type(bank).__name__ for bank in banks.values()}
    if kinds != {"LowRank"}:
        raise ConfigError(
            "export",
            ", ".join(sorted(kinds)) or "nothing",
            "peft's LoRA format holds LowRank modules only",
            "attach LowRank",
        )
    settings = {(bank.rank, bank.alpha) for bank in banks.values() if isinstance(bank, LowRank)}
    if len(settings) != 1:
        raise ConfigError(
            "rank, alpha",
            sorted(settings),
            "must be the same at every place",
            "export places of one rank at a time",
        )
    tensors = {}
    for name, bank in banks.items():
        assert isinstance(bank, LowRank)
        place = model.get_submodule(name)
        if not isinstance(place, nn.Linear) or not name:
            what = f"{name} is a {type(place).__name__}" if name else "the model itself has no name"
            raise ConfigError(
                "export",
                name,
                f"{what}, and peft finds Linear modules by name",
                "attach LowRank to such ones",
            )
        if not 0 <= module < bank.num_modules or not bank.holds_all_modules:
            raise ConfigError(
                "module",
                module,
                f"must be one of 0 to {bank.num_modules - 1}, on a rank that holds all",
                "name one of them",
            )
        tensors[f"base_model.model.{name}.lora_A.weight"] = (
            bank.a[module].detach().t().contiguous().cpu()
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = (
            bank.b[module].detach().t().contiguous().cpu()
        )
    rank, alpha = settings.pop()
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


def _target_modules(model: nn.Module, places: list[str]) -> list[str] | str:
    """What peft finds these places by, and no others: their names, or a pattern where a name ends another one's too."""
    endings = tuple(f".{place}" for place in places)
    if any(name.endswith(endings) and name not in places for name, _ in model.named_modules()):
        return "|".join(map(re.escape, places))
    return places


def read_peft(folder: str | Path) -> PeftAdapter:
    """One LoRA adapter as peft saved it. Raises CheckpointError where a file is missing, or means what `LowRank` cannot."""
    try:
        config: dict[str, Any] = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: holds no adapter in peft's format with safetensors ({error})"
        ) from None
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder}: is an adapter of type {config.get('peft_type')}; LORA can be read"
        )
    if wrong := [name for name in UNSUPPORTED if config.get(name)]:
        raise CheckpointError(
            f"{folder}: {wrong[0]}={config[wrong[0]]} changes what the adapter computes and has no counterpart here"
        )
    if config.get("init_lora_weights", True) not in SAFE_INITS:
        raise CheckpointError(
            f"{folder}: init_lora_weights={config['init_lora_weights']} has changed the core it was trained on; "
            "save it with peft's path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{folder}: bias={config['bias']} trains the core's biases; only none can be read"
        )
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = TENSOR_NAME.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{folder}: {key} is no factor of a low-rank module")
        sides.setdefault(match["place"], {})[match["side"]] = value.t()
    if half := [place for place, both in sides.items() if len(both) != 2]:
        raise CheckpointError(f"{folder}: {half[0]} has one of its two factors only")
    rank = int(config["r"])
    if other := [
        place
        for place, both in sides.items()
        if both["A"].shape[1] != rank or both["B"].shape[0] != rank
    ]:
        raise CheckpointError(
            f"{folder}: {other[0]} has another rank than r={rank}; places of one rank can be read"
        )
    alpha = float(config["lora_alpha"]) * (sqrt(rank) if config.get("use_rslora") else 1.0)
    return PeftAdapter(
        rank, alpha, {place: (both["A"], both["B"]) for place, both in sides.items()}
    )


def import_peft(
    model: nn.Module,
    folders: Sequence[str | Path],
    router: RouterMaker | None = None,
    aggregation: AggregationMaker = WeightedSum,
) -> dict[str, AdapterLayer]:
    """Attach adapters that peft saved as the modules of one bank a place, in the order of the folders.

    `router` chooses among them; for one folder the default applies it to every token, as peft does.
    Raises: CheckpointError for what cannot be read or does not fit the model; ConfigError where adapters differ in places, rank or
    alpha.
    """
    adapters = [read_peft(folder) for folder in folders]
    if (
        len({(adapter.rank, adapter.alpha, tuple(sorted(adapter.factors))) for adapter in adapters})
        != 1
    ):
        raise ConfigError(
            "folders",
            list(map(str, folders)),
            "must agree in places, rank and alpha",
            "import each into a bank of its own model",
        )
    if router is None:
        if len(folders) != 1:
            raise ConfigError(
                "router",
                None,
                f"must choose among {len(folders)} modules",
                "give one, e.g. routed('top_k', ...)",
            )
        router = constant(1.0)
    first = adapters[0]
    _check_fits(model, folders[0], first)
    pattern = re.compile("|".join(map(re.escape, first.factors)))
    bank = partial(LowRank, len(folders), rank=first.rank, alpha=first.alpha)
    made = attach(model, pattern, bank, router, aggregation)
    with torch.no_grad():
        for name, layer in made.items():
            assert isinstance(layer.experts, LowRank)
            for module, adapter in enumerate(adapters):
                a, b = adapter.factors[name]
                layer.experts.a[module].copy_(a)
                layer.experts.b[module].copy_(b)
    return made


def _check_fits(model: nn.Module, folder: str | Path, adapter: PeftAdapter) -> None:
    places = dict(model.named_modules())
    for name, (a, b) in adapter.factors.items():
        place = places.get(name)
        if not isinstance(place, nn.Linear) or (place.in_features, place.out_features) != (
            len(a),
            b.shape[1],
        ):
            raise CheckpointError(
                f"{folder}: {name} is a Linear of {len(a)} to {b.shape[1]} there, and none of the model's"
            )
