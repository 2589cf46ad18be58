"""The names of exported tensors are those that llama.cpp's converter knows, by its own table.

`convert_hf_to_gguf.py` stacks the experts of a layer, renames a few tensors in the code of a family,
and looks every name up in `gguf.tensor_mapping`; a name that is not there ends the conversion.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hf.families import tiny

ARCHITECTURES = {
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "granitemoe": "granitemoe",
    "phimoe": "phimoe",
    "ernie4_5_moe": "ernie4_5-moe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "dots1": "dots1",
    "minimax_m2": "minimax-m2",
    "mimo_v2_flash": "mimo2",
    "mistral4": "mistral4",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
    "jamba": "jamba",
    "afmoe": "afmoe",
}
"""Of gguf, by `model_type`."""
RENAMED = (
    (r"\.experts\.\d+\.", ".experts."),
    (r"e_score_correction_bias$", "e_score_correction.bias"),
    (r"\.dt_bias$", ".dt_proj.bias"),
    (r"\.experts\.gate_up_proj(?:_bias)?$", ".experts.gate_proj"),
    (r"\.experts\.down_proj_bias$", ".experts.down_proj"),
    (r"block_sparse_moe\.input_linear\.weight$", "block_sparse_moe.experts.w1.weight"),
)
"""What the converter's code does to names before it looks them up: stacking, splitting, endings."""
REASON = "gguf, llama.cpp's table of names, is missing: pip install -e '.[test]'"


def unknown_names(family: str, folder: Path) -> list[str]:
    """Return the tensors of a family's files that the converter has no name for."""
    gguf = pytest.importorskip("gguf", reason=REASON)
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[family]]
    table = gguf.get_tensor_name_map(number, 3)
    tiny(family, torch.float32).save_pretrained(folder)
    found = []
    for stored in load_file(folder / "model.safetensors"):
        name = stored
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        known = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None or (".experts." in name and "_exps" not in known):
            found.append(stored)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_exported_name_is_known(family: str, tmp_path: Path) -> None:
    """Export writes the names of the source: `test_export.py`; those here are of the source."""
    assert unknown_names(family, tmp_path) == []


def test_a_name_that_is_not_known_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "lfm2_moe", "olmoe")
    assert any(".conv." in name for name in unknown_names("lfm2_moe", tmp_path))
