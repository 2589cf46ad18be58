"""A field in the wrong section, or under another framework's name, is named in the refusal.

A new user wrote `train.lr`, `optim.learning_rate`, `train.batch_size` and `seed`, and read 17 names
of the wrong section each time.
"""

from __future__ import annotations

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.field_aliases import ALIASES
from dmoe.config.fields import list_fields
from dmoe.config.load import load, load_text
from dmoe.config.schema import TrainConfig

FIELDS = {field.name for field in list_fields()}


def test_every_alias_is_of_a_field_and_is_none_itself() -> None:
    assert set(ALIASES.values()) <= FIELDS
    assert not set(ALIASES) & {name.rpartition(".")[2] for name in FIELDS}


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("train.lr=0.1", "optim.lr"),
        ("optim.learning_rate=0.1", "optim.lr"),
        ("train.batch_size=8", "train.global_batch"),
        ("seed=1", "train.seed"),
        ("model.num_experts=8", "moe.num_experts"),
        ("moe.groups=2", "moe.router.groups"),
        ("model.num_experts_per_tok=2", "moe.top_k"),
        ("moe.topk=2", "moe.top_k"),
        ("moe.top_kk=2", "moe.top_k"),
    ],
)
def test_the_field_that_was_meant_is_named(override: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    assert field in caught.value.fix


def test_a_word_is_a_list_of_one() -> None:
    assert load(None, ["tracking.trackers=wandb"]).tracking.trackers == ["wandb"]
    assert load_text("tracking: {trackers: tensorboard}", "x").tracking.trackers == ["tensorboard"]
    with pytest.raises(ConfigError, match=r"tracking\.trackers"):
        load(None, ["tracking.trackers={a: b}"])


@pytest.mark.parametrize(("old", "new"), [("true", "block"), ("no", "none")])
def test_an_old_value_of_a_field_is_still_taken(old: str, new: str) -> None:
    assert load(None, [f"train.recompute={old}"]).train.recompute == new
    assert load_text(f"train: {{recompute: {old}}}", "x").train.recompute == new
    assert TrainConfig(recompute=new == "block").recompute == new  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none or activation or experts or block"):
        load(None, ["train.recompute=all"])
