"""Every family of docs/models.md equals plain transformers, at EP = 1 and EP = 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.published import READS_IMAGES, REFUSED
from tests.hf.families import FAMILIES
from tests.hf.table import (
    FILES_END,
    FILES_START,
    Row,
    measure_all,
    measure_files,
    written_rows,
)

TOLERANCE = 1e-13
"""In float64, with what transformers computes in float32 in float64 too."""


NO_MIXTURES = {"bamba", "vitpose"}
"""Folders of transformers whose models mention experts and have none."""


def check(row: Row) -> None:
    assert row.largest < TOLERANCE, row
    assert row.drops_1 == row.drops_2 > 0, row
    assert written_rows()[row.family][0] == row.score


def test_a_family_equals_transformers() -> None:
    """A sample of the ranks tier: clamps, biases and interleaved stacks; a bias of the choice."""
    for row in measure_all(["gpt_oss", "lfm2_moe"]):
        check(row)


@pytest.mark.ranks
def test_every_family_equals_transformers() -> None:
    rows = measure_all([family for family in FAMILIES if family not in ("gpt_oss", "lfm2_moe")])
    for row in rows:
        check(row)


def test_the_document_has_every_family() -> None:
    assert list(written_rows()) == list(FAMILIES)
    assert list(written_rows(FILES_START, FILES_END)) == list(FAMILIES)
    for family, (_, *differences, _) in written_rows().items():
        assert max(map(float, differences)) < TOLERANCE, family
    for family, (different, *differences) in written_rows(FILES_START, FILES_END).items():
        assert different.startswith("0 of "), family
        assert {*differences} == {"refused"} or max(map(float, differences)) < 1e-12, family


def folder_of(family: str) -> str:
    """Return the folder of transformers that has the models of a `model_type`."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    return model_type_to_module_name(family)


def test_every_mixture_of_transformers_is_a_row_or_refused() -> None:
    """A release with a new family, or without one that is named here, is red."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    files = {file: file.read_text(encoding="utf-8") for file in models.glob("*/modeling_*.py")}
    mixtures = {file.parent.name for file, text in files.items() if "experts" in text.lower()}
    rows, refused = {*map(folder_of, FAMILIES)}, {*map(folder_of, REFUSED)}
    assert not rows & refused
    assert (rows | refused) - mixtures == set()
    assert mixtures - rows - refused == NO_MIXTURES
    stacked = {file.parent.name for file, text in files.items() if "@use_experts_impl" in text}
    assert len(rows) == len(FAMILIES)
    assert len(stacked) > 60, "the search finds too little"


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_no_row_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ConfigError) as error:
        load(None, [f"model.source={tmp_path}", "data.tokenizer=bytes"])
    assert f"is a {family}, which {REFUSED[family]}; give a model of" in str(error.value)
    assert error.value.field == "model.source"


def test_the_reason_of_those_that_read_images_is_true() -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    causal = transformers.AutoModelForCausalLM._model_mapping
    for family, why in REFUSED.items():
        kind = CONFIG_MAPPING[family]
        if why == READS_IMAGES:
            assert kind not in causal, family
            assert {"text_config", "thinker_config"} & kind.sub_configs.keys(), family


def test_moefy_says_why_it_refuses_a_model_without_stacks() -> None:
    class Other(nn.Module):
        config = type("Config", (), {"model_type": "jetmoe"})()

    with pytest.raises(ConfigError, match=r"Other \(jetmoe\): has experts in its attention too"):
        dmoe.moefy(Other())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_lora_of_every_family(family: str, tmp_path: Path) -> None:
    """Import -> export gives the same bytes; peft computes the same with the factors, both ways."""
    row = measure_files(family, tmp_path)
    assert row.different == 0 < row.tensors, row
    found = [row.peft, row.back, row.merged]
    if family in ("llama4_text", "longcat_flash"):
        assert found == [None] * 3, "peft takes its stacks for others, so LoRA on them is refused"
    else:
        assert max(value for value in found if value is not None) < 1e-12, row
        assert None not in found, row
