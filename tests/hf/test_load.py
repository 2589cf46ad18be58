"""Reading the files of a published model: FP8, tensors that are left out, files that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check
from dmoe.hf.published import PublishedDirectory
from dmoe.train.tasks import task_of
from tests.hf.families import tiny

FILE = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny("deepseek_v3", torch.float32, vocab_size=256).save_pretrained(tmp_path)
    return tmp_path


def write(source: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    """Replace the tensors, and set fields of config.json."""
    save_file(tensors, source / FILE, metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | config))


def read(source: Path) -> Any:
    config = load(None, [f"model.source={source}", "data.tokenizer=bytes"])
    check(config)
    model: Any = task_of(config).build_model()
    model.to_empty(device="cpu")
    model.initialize(0)
    return model


def test_the_weights_are_those_of_the_file(source: Path) -> None:
    model, plain = read(source), tiny("deepseek_v3", torch.float32, vocab_size=256)
    expected = plain.state_dict()
    assert list(model.hf.state_dict()) == list(expected)
    for name, value in model.hf.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not model.notes
    ids = torch.arange(8).unsqueeze(0)
    ours, theirs = model(ids).logits, plain(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_fp8_is_dequantised_with_a_note(source: Path) -> None:
    tensors, exact = {}, {}
    for name, value in load_file(source / FILE).items():
        if value.ndim == 2 and ".experts." in name:
            scale = value.abs().max() / 448
            tensors[name] = (value / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.view(1, 1)
            exact[name] = tensors[name].float() * scale
        else:
            tensors[name] = value
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    write(source, tensors, quantization_config=fp8)
    model = read(source)
    experts = model.hf.model.layers[1].mlp.experts
    gate = exact["model.layers.1.mlp.experts.3.gate_proj.weight"]
    assert experts.gate_up_proj.dtype == torch.float32
    torch.testing.assert_close(experts.gate_up_proj[3][: len(gate)], gate)
    assert model.notes == ["model.source is quantised (fp8): read as torch.float32"]


def test_longcat_without_rows_of_identities(tmp_path: Path) -> None:
    """As published: transformers 5.23 refuses the shape; dmoe reads what its own files give."""
    tiny("longcat_flash", torch.float32, vocab_size=256).save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / FILE)
    kept = {n: v for n, v in tensors.items() if not re.search(r"experts\.(8|9|1\d)\.", n)}
    assert len(kept) < len(tensors)
    shutil.copytree(tmp_path / "whole", tmp_path / "published")
    write(tmp_path / "published", kept)
    whole, published = read(tmp_path / "whole"), read(tmp_path / "published")
    for (name, one), other in zip(whole.named_parameters(), published.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_other_quantisations_are_refused(source: Path) -> None:
    write(source, load_file(source / FILE), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="is quantised by gptq, which cannot be trained"):
        read(source)


def test_what_transformers_leaves_out_is_said(source: Path) -> None:
    """Multi-token prediction: dropped without a word by transformers."""
    tensors = load_file(source / FILE)
    tensors["model.layers.61.eh_proj.weight"] = torch.zeros(2, 2)
    write(source, tensors)
    (note,) = read(source).notes
    assert "1 tensors of model.source, such as model.layers.61.eh_proj.weight" in note


def test_layers_beyond_those_of_the_config_are_said(source: Path) -> None:
    """A config.json with one layer too few: half of the files was left out without a word."""
    tensors = load_file(source / FILE)
    tensors |= {n.replace("s.1.", "s.2."): v.clone() for n, v in tensors.items() if "s.1." in n}
    write(source, tensors)
    (note,) = read(source).notes
    assert "tensors of model.source, such as model.layers.2." in note


def test_a_tensor_in_two_files_is_refused(source: Path) -> None:
    """Two shards with another `model.norm.weight` each: one of them was trained, nobody knew which.

    An index that names a file elsewhere read it, and ended in a traceback. Beside a single file
    the index is not read, as by transformers, so that training and export mean the same weights.
    """
    tensors = load_file(source / FILE)
    names = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    other = {"model.norm.weight": torch.ones(3)}
    save_file(tensors, source / "a.safetensors", metadata={"format": "pt"})
    save_file(other, source / "b.safetensors", metadata={"format": "pt"})
    index = source / f"{FILE}.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert PublishedDirectory(source).tensors.keys() == tensors.keys()
    read(source)
    (source / FILE).unlink()
    with pytest.raises(ConfigError, match=r"'model.norm.weight' is in two files"):
        read(source)
    for file in ("../a.safetensors", None):
        index.write_text(json.dumps({"weight_map": names | {"model.norm.weight": file}}))
        with pytest.raises(ConfigError, match="that is none beside it"):
            read(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "lacks 1 tensors of the model, such as model.norm.weight"),
        ("shape", r"gives model.norm.weight the shape \[7\], and config.json says \[\d+\]"),
        ("expert", r"lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"),
        ("rows", r"experts\.3\.up_proj\.weight the shape \[7, .*\], and of the other experts \["),
        ("experts", r"experts.down_proj the shape \[7, .*\], and config.json says \[8, "),
        ("nan", r"gives model\.layers\.1\.mlp\.experts\.gate_up_proj numbers that are not finite"),
        ("inf", r"gives model\.norm\.weight numbers that are not finite"),
        ("damaged", "cannot be read"),
        ("cut off", "cannot be read"),
        ("no files", r"has no \*.safetensors"),
    ],
)
def test_files_that_do_not_fit_are_refused(source: Path, change: str, message: str) -> None:
    """A file of half the size was a traceback; another shape, transformers' "report above".

    That again for a tensor of one expert, which is stacked with another one: gate and up. One NaN
    was found in the first step, whose advice was a lower learning rate.
    """
    tensors = load_file(source / FILE)
    up = next(n for n in tensors if n.endswith("experts.3.up_proj.weight"))
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "shape":
        tensors["model.norm.weight"] = torch.zeros(7)
    elif change == "expert":
        del tensors[up]
    elif change == "rows":
        tensors[up] = tensors[up][:7].contiguous()
    elif change == "nan":
        tensors[up][0, 0] = torch.nan
    elif change == "inf":
        tensors["model.norm.weight"][1] = -torch.inf
    elif change == "experts":
        tensors = {n: v for n, v in tensors.items() if ".experts.7." not in n}
    write(source, tensors)
    if change == "damaged":
        (source / FILE).write_bytes((source / FILE).read_bytes()[:-100])
    elif change == "cut off":
        size = (source / FILE).stat().st_size
        (source / FILE).write_bytes((source / FILE).read_bytes()[: size // 2])
    elif change == "no files":
        (source / FILE).unlink()
    with pytest.raises(ConfigError, match=message) as error:
        read(source)
    assert error.value.field == "model.source"
    assert "\n" not in str(error.value)
