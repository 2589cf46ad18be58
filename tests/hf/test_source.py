"""`model.source` in the config: what comes from it, and what is refused in one sentence."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmoe.config.errors import ConfigError
from dmoe.config.load import load, load_text, to_yaml
from dmoe.config.published import with_source
from dmoe.config.rules import check
from dmoe.config.schema import Config, ModelConfig
from dmoe.explain import explain
from dmoe.train.run import check_document_mask
from dmoe.train.tasks import task_of
from tests.hf.families import tiny

BYTES = "data.tokenizer=bytes"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "mixtral"
    tiny("mixtral", torch.float32, vocab_size=256).save_pretrained(folder)
    return folder


def test_the_shape_comes_from_the_source(source: Path) -> None:
    config = load(None, [f"model.source={source}", BYTES])
    check(config)
    moe, model = config.moe, config.model
    assert (moe.num_experts, moe.top_k, moe.expert_dim) == (8, 2, 24)
    assert (model.dim, model.layers, model.heads) == (32, 2, 4)


def test_the_recorded_config_is_complete(source: Path) -> None:
    """resolved.yaml is read without the source: a report needs no weights."""
    text = to_yaml(load(None, [f"model.source={source}", BYTES]))
    moved = text.replace(str(source), "/nowhere")
    assert load_text(moved, "resolved.yaml").moe.expert_dim == 24
    with pytest.raises(ConfigError, match=r"model.source=/nowhere"):
        check(load_text(moved, "resolved.yaml"))


def test_a_config_of_python_is_resolved_too(source: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    config = with_source(Config(model=ModelConfig(source=str(source))))
    (source / "tokenizer.json").unlink()
    assert config.moe.expert_dim == 24
    assert config.data.tokenizer == str(source / "tokenizer.json")


def test_the_model_is_that_of_the_source(source: Path) -> None:
    """Parameters of all experts, active ones, and the embedding; on the meta device."""
    with torch.device("meta"):
        model = task_of(load(None, [f"model.source={source}", BYTES])).build_model()
    counts = model.num_parameters()
    plain = tiny("mixtral", torch.float32, vocab_size=256)
    total = sum(p.numel() for p in plain.parameters())
    experts = sum(p.numel() for n, p in plain.named_parameters() if ".experts." in n)
    assert counts.total == counts.trainable == total
    assert counts.active == total - experts * 6 // 8
    assert counts.embedding == 256 * 32
    assert all(parameter.is_meta for parameter in model.parameters())


CONTRADICTIONS = {
    "moe.num_experts=16": "moe.num_experts=16: is 8 in model.source",
    "moe.top_k=1": "moe.top_k=1: is 2 in model.source",
    "model.dim=64": "model.dim=64: is 32 in model.source",
    "model.qk_norm=false": "model.qk_norm=False: is what the model of model.source has",
    "moe.router.score=sigmoid": "moe.router.score=sigmoid: is what the model",
    "moe.experts.shared=1": "moe.experts.shared=1: is what the model",
    "moe.capacity.renormalize=true": "does not scale to a fixed sum",
    "optim.kind=muon": "optim.kind=muon: knows the matrices of dmoe's own",
    "modular.bank=low_rank": "modular.bank=low_rank: attaches modules",
}


@pytest.mark.parametrize("setting", CONTRADICTIONS)
def test_what_contradicts_the_source_is_refused(source: Path, setting: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(load(None, [f"model.source={source}", BYTES, setting]))
    assert CONTRADICTIONS[setting] in str(error.value)


def refused(folder: Path, *more: str) -> str:
    with pytest.raises(ConfigError) as error:
        check(load(None, [f"model.source={folder}", BYTES, *more]))
    assert error.value.field == "model.source"
    return str(error.value)


def test_the_fix_of_a_document_mask_is_one_that_its_user_can_do(source: Path) -> None:
    """Instruct data ask for the mask by themselves; the advice was to change a class of dmoe."""
    config = load(None, [f"model.source={source}", BYTES])
    engine: Any = SimpleNamespace(config=config, model=task_of(config).build_model())
    with pytest.raises(ConfigError) as refused:
        check_document_mask(engine, SimpleNamespace(document_mask=True))
    assert str(refused.value).endswith("documents apart; use data.document_mask=false")
    assert "reads_positions" not in str(refused.value)


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    assert "must be the directory" in refused(tmp_path / "missing" / "deep")
    assert "has no config.json" in refused(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    assert "is no model that transformers" in refused(tmp_path)
    file.write_text(json.dumps({"model_type": "a_family_of_tomorrow"}))
    assert "a_family_of_tomorrow" in refused(tmp_path)
    file.write_text(json.dumps({"model_type": "llama"}))
    assert "gives no num_local_experts" in refused(tmp_path)


def test_a_file_is_not_looked_for_on_the_hub(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model.source=mixtral/config.json` was taken for a name on the hub, and tried for 30 s."""
    monkeypatch.chdir(source.parent)
    monkeypatch.setattr("dmoe.config.published._download", lambda *_: pytest.fail("the hub"))
    assert "must be the directory of a published model" in refused(Path("mixtral/config.json"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_act", "nope", "from the MixtralConfig of its config.json: KeyError: 'nope'"),
        ("rope_parameters", {"rope_type": "none_such"}, "KeyError: 'none_such'"),
        ("attention_dropout", 2.0, "says attention_dropout=2.0 in config.json, which must be from"),
    ],
)
def test_a_config_of_which_no_model_can_be_built(
    field: str, value: object, words: str, source: Path, tmp_path: Path
) -> None:
    """A traceback of transformers each: it checks few fields before it uses them.

    With lines of its own before it, one for each time that dmoe reads the config.
    """
    settings = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {field: value}))
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logging.getLogger("transformers").addHandler(handler)
    try:
        config = load(None, [f"model.source={tmp_path}", BYTES])
        with pytest.raises(ConfigError, match=re.escape(words)) as error:
            task_of(config).build_model()
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert error.value.field == "model.source"
    assert printed.getvalue() == ""


def test_a_tokenizer_that_is_missing_is_named(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer=None: is that of .* no tokenizer.json"):
        load(None, [f"model.source={source}"])


def test_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    tiny("mixtral", torch.float32).save_pretrained(tmp_path)
    config = load(None, [f"model.source={tmp_path}", BYTES])
    with pytest.raises(ConfigError, match=r"has 256 tokens, and model\.source=.* has 97"):
        task_of(config).build_model()


def test_without_transformers(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'dmoe[models]'" in refused(source)


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused(Path("nobody/no-such-model"))
    assert "is no directory here, and not to be had from the hub" in message
    assert message.count("\n") == 0


def test_explain_says_what_the_source_decides(source: Path) -> None:
    """No sentence about dmoe's own router, and the numbers of the published model."""
    sections = explain(load(None, [f"model.source={source}", BYTES]), 2)
    text = "\n".join(sentence for section in sections for sentence in section.sentences)
    assert "the published model's own router, trained; it chooses 2 of 8 experts" in text
    assert "softmax of the logits" not in text
    assert f"Model: {source}, 2 blocks of width 32" in text
    assert "rank 1: experts 4-7" in text
