"""Training from FP8 and MXFP4 files: the losses of their weights, decoded here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dmoe
from dmoe.config.errors import CheckpointError
from dmoe.hf.export import export_checkpoint
from tests.hf.test_export import make_checkpoint
from tests.hf.tiny_hf import tiny_directory

FILE = "model.safetensors"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of codes 0 to 7 of E2M1 (OCP Microscaling Formats 1.0); 8 to 15 are the negatives."""


def mxfp4(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return random codes [E, rows, groups, 16], scales, and the weights [E, columns, rows].

    A byte holds two codes, the low half first; 32 codes of a row share the scale 2^(s - 127).
    """
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 125, shape, generator=generator, dtype=torch.uint8)
    weights = torch.empty(*shape, 32)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        for b, byte in enumerate(blocks[tuple(place)].tolist()):
            for half, code in enumerate((byte & 15, byte >> 4)):
                value = FP4[code & 7] * (-1 if code & 8 else 1)
                weights[(*place, 2 * b + half)] = value * 2.0 ** (int(scales[tuple(place)]) - 127)
    return blocks, scales, weights.flatten(2).transpose(1, 2).contiguous()


def write_both(family: str, folder: Path) -> tuple[Path, Path]:
    """Write a quantised directory, and one with the weights that it stands for."""
    more = {"intermediate_size": 32} if family == "gpt_oss" else {}
    plain = Path(tiny_directory(family, folder / "plain", vocab_size=256, **more))
    coded = Path(tiny_directory(family, folder / "coded", vocab_size=256, **more))
    codes: dict[str, Tensor] = {}
    values = load_file(plain / FILE)
    generator = torch.Generator().manual_seed(2)
    for name, value in list(values.items()):
        if family == "gpt_oss" and name.endswith(("gate_up_proj", "down_proj")):
            rows = (len(value), value.shape[2], value.shape[1] // 32)
            blocks, scales, values[name] = mxfp4(rows, generator)
            codes |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        elif family == "mixtral" and ".experts." in name:
            scale = value.abs().max() / 448
            codes |= {name: (value / scale).to(torch.float8_e4m3fn)}
            codes |= {f"{name}_scale_inv": scale.view(1, 1)}
            values[name] = codes[name].float() * scale
        else:
            codes[name] = value
    save_file(values, plain / FILE, {"format": "pt"})
    save_file(codes, coded / FILE, {"format": "pt"})
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    method = {"quant_method": "mxfp4"} if family == "gpt_oss" else fp8
    content = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(content | {"quantization_config": method}))
    return coded, plain


def losses(source: Path, run: Path) -> list[float]:
    config = dmoe.load_config(
        None,
        [
            *(f"model.source={source}", "data.tokenizer=bytes", "data.source=synthetic:zipf"),
            *("data.seq_len=16", "train.steps=3", "train.global_batch=4", "train.log_every=1"),
            *("train.precision=fp32", "train.device=cpu", f"train.run_dir={run}"),
            *("train.eval_every=3", "train.eval_sequences=2", "optim.warmup=0", "optim.lr=0.001"),
        ],
    )
    dmoe.train(config, quiet=True)
    return [line["loss"] for line in dmoe.read_metrics(run).of("train")]


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_it_trains_as_the_weights_that_it_stands_for(family: str, tmp_path: Path) -> None:
    coded, plain = write_both(family, tmp_path)
    found = losses(coded, tmp_path / "a")
    assert len(found) == 3
    assert found == pytest.approx(losses(plain, tmp_path / "b"), rel=1e-6)


def test_fp8_tensors_that_the_class_does_not_know_are_refused(tmp_path: Path) -> None:
    """Layers of multi-token prediction in FP8 beside a bfloat16 export would need both formats."""
    coded, plain = write_both("mixtral", tmp_path)
    checkpoint = make_checkpoint(plain, tmp_path / "run")
    codes = load_file(coded / FILE)
    name = "model.layers.61.eh_proj.weight"
    codes |= {
        name: torch.zeros(4, 4).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": torch.ones(1, 1),
    }
    save_file(codes, coded / FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be copied beside bfloat16"):
        export_checkpoint(checkpoint, coded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
