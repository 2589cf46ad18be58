"""`LoRA` against Hugging Face's peft: equal numbers, and files that both read."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.modular import (
    Adapter,
    LoRA,
    adapter_layers,
    attach,
    constant,
    detach,
    export_peft,
    freeze,
    import_peft,
    routed,
)
from dmoe.modular.peft import read_peft
from tests.modular.nets import hugging_face, randomize

peft = pytest.importorskip(
    "peft", reason="peft is not installed: it is what these tests compare with"
)
TOKENS = torch.arange(24).view(2, 12)
PATTERN = "*.[qv]_proj"


def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def peft_model(rank: int = 3, **options: object) -> nn.Module:
    """Create peft's LoRA with random factors, B included."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, **options
    )
    model = peft.get_peft_model(hugging_face(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_one_module_equals_pefts_lora_forward_and_backward() -> None:
    theirs, ours = peft_model(), hugging_face()
    made = attach(ours, PATTERN, partial(LoRA, 1, rank=3, alpha=8.0), constant(1.0))
    with torch.no_grad():
        for name, layer in made.items():
            place = theirs.base_model.model.get_submodule(name)
            layer.experts.a[0].copy_(place.lora_A["default"].weight.t())
            layer.experts.b[0].copy_(place.lora_B["default"].weight.t())
    freeze(ours)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    logits(ours).square().sum().backward()
    logits(theirs).square().sum().backward()
    for name, layer in made.items():
        place = theirs.base_model.model.get_submodule(name)
        for mine, side in ((layer.experts.a, place.lora_A), (layer.experts.b, place.lora_B)):
            gradient = side["default"].weight.grad
            assert gradient.abs().max() > 1e-3
            torch.testing.assert_close(mine.grad[0].t(), gradient, rtol=1e-5, atol=1e-6)


def test_what_is_exported_peft_loads(tmp_path: Path) -> None:
    model = hugging_face()
    attach(model, PATTERN, partial(LoRA, 2, rank=3, alpha=8.0), constant(0.0, 1.0))
    randomize(model)
    export_peft(model, 1, tmp_path, base_model="tiny", task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(hugging_face(), tmp_path)
    assert (logits(model) - logits(hugging_face())).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rank-stabilised"])
def test_what_peft_saved_is_imported(options: dict[str, bool], tmp_path: Path) -> None:
    theirs, ours = peft_model(**options), hugging_face()
    theirs.save_pretrained(tmp_path)
    import_peft(ours, [tmp_path])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)


def test_a_round_trip_is_bit_identical_and_several_make_a_mixture(tmp_path: Path) -> None:
    model = hugging_face()
    attach(model, PATTERN, partial(LoRA, 2, rank=3, alpha=8.0), constant(0.25, 0.75))
    randomize(model)
    mixture, before = logits(model), copy.deepcopy(adapter_layers(model))
    for module in range(2):
        export_peft(model, module, tmp_path / str(module))
    detach(model)
    import_peft(model, [tmp_path / "0", tmp_path / "1"], constant(0.25, 0.75))
    assert torch.equal(logits(model), mixture)
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.experts.a, before[name].experts.a)
        assert torch.equal(layer.experts.b, before[name].experts.b)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("modules_to_save", ["lm_head"]),
        ("alpha_pattern", {"q_proj": 1}),
        ("r", 5),
    ],
)
def test_unsupported_settings_are_refused(field: str, value: object, tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    model = hugging_face()
    with pytest.raises(
        CheckpointError,
        match="r=5" if field == "r" else str(value if field == "peft_type" else field),
    ):
        import_peft(model, [tmp_path])
    assert adapter_layers(model) == {}


def test_another_model_and_another_kind_are_refused(tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="none of the model's"):
        import_peft(nn.Sequential(nn.Linear(3, 3)), [tmp_path])
    with pytest.raises(CheckpointError, match="no adapter"):
        read_peft(tmp_path / "nowhere")
    model = hugging_face()
    with pytest.raises(ConfigError, match="router"):
        import_peft(model, [tmp_path, tmp_path])
    attach(model, PATTERN, partial(Adapter, 2), routed("top_k", 2, 2))
    with pytest.raises(ConfigError, match="Adapter"):
        export_peft(model, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
