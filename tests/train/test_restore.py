"""Which changes of a config make another run of it, and what another number of ranks redefines."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import pytest

from dmoe.config.errors import CheckpointError
from dmoe.train.restore import check_same_run, describe_changes
from tests.tiny import tiny

SAVED: dict[str, Any] = json.loads(json.dumps(asdict(tiny())))
"""As a manifest gives it back."""


def check(*overrides: str, data: str = "same") -> None:
    check_same_run(SAVED, "same", tiny(*overrides), data)


def refusal(*overrides: str, data: str = "same") -> str:
    with pytest.raises(CheckpointError) as refused:
        check(*overrides, data=data)
    return str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        *(
            "optim.lr=0.1",
            "optim.schedule=wsd",
            "optim.clip=null",
            "train.steps=99",
            "train.micro_batch=1",
            "train.precision=bf16",
        ),
        *(
            "train.recompute=true",
            "train.log_every=1",
            "parallel.mode=fsdp",
            "parallel.virtual_ranks=2",
            "checkpoint.every=1",
        ),
        *(
            "moe.exchange=padded",
            "guard.patience=2",
            "debug.collectives=true",
            "tracking.trackers=[tensorboard]",
        ),
    ],
)
def test_neutral_fields(change: str) -> None:
    more = ["moe.capacity.factor=1.25"] if "padded" in change else []
    if more:
        check_same_run(
            json.loads(json.dumps(asdict(tiny(*more)))), "same", tiny(*more, change), "same"
        )
    else:
        check(change)


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("train.global_batch", "8", "16"),
        ("train.seed", "0", "1"),
        ("moe.num_experts", "8", "4"),
        ("moe.router.kind", "top_k", "noisy"),
        ("moe.balance.switch", "0.01", "0.5"),
        ("moe.capacity.factor", "None", "1.0"),
        ("model.layers", "2", "3"),
    ],
)
def test_a_field_that_means_another_run_is_refused_unless_it_is_named(
    name: str, before: str, now: str
) -> None:
    said = refusal(f"{name}={now}")
    assert said.startswith(f"{name}={now}: the checkpoint was trained with {before}; ")
    assert said.endswith(f"checkpoint.accept_changes=[{name}]")
    check(f"{name}={now}", f"checkpoint.accept_changes=[{name}]")
    check(f"{name}={now}", f"checkpoint.accept_changes=[{name.split('.')[0]}]")
    assert refusal(f"{name}={now}", "checkpoint.accept_changes=[train.stepsize]")


def test_other_modules_are_another_run_even_if_accepted() -> None:
    """The refusal once offered `accept_changes`, which then failed on tensors that are not there."""
    for change in ("modular.bank=low_rank", "modular.modules=2"):
        text = refusal("modular.bank=low_rank", change, "checkpoint.accept_changes=[modular]")
        assert text.endswith(
            "go on from this run in another train.run_dir, with this one as modular.core"
        )


def test_a_section_is_no_prefix_of_a_word() -> None:
    assert refusal("moe.num_experts=4", "checkpoint.accept_changes=[mo]")
    assert refusal("train.seed=3", "checkpoint.accept_changes=[train.see]")


def test_the_line_that_is_suggested_keeps_what_was_accepted_before() -> None:
    """It named the next field alone once, and whoever did as it said was told the first one again."""
    said = refusal(
        "train.seed=1", "moe.num_experts=4", "checkpoint.accept_changes=[moe.num_experts]"
    )
    assert said.endswith("checkpoint.accept_changes=[moe.num_experts,train.seed]")


def test_other_data_is_named_by_the_fields_that_differ() -> None:
    assert refusal("data.seq_len=8", data="other").startswith(
        "data.seq_len=8: the checkpoint was trained with 16"
    )
    assert refusal(data="other").startswith(
        "data.source=synthetic:zipf: its content is not what the checkpoint was trained on"
    )
    check("checkpoint.accept_changes=[data.source]", data="other")
    check(
        "data.tokenizer=somewhere.json"
    )  # the content decides: a file that has only moved is the same tokenizer


def test_to_accept_one_change_of_the_data_is_not_to_accept_another() -> None:
    """It was: only the first of the fields that differ was looked at."""
    both = ("data.source=synthetic:uniform", "data.seq_len=8")
    for accepted, missing in (("data.source", "data.seq_len"), ("data.seq_len", "data.source")):
        assert refusal(*both, f"checkpoint.accept_changes=[{accepted}]", data="other").startswith(
            f"{missing}="
        )
    check(*both, "checkpoint.accept_changes=[data.source,data.seq_len]", data="other")


def test_fields_come_and_go_with_versions() -> None:
    """One that is new means what was so before; one that is gone means nothing any more."""
    saved = copy.deepcopy(SAVED)
    del saved["moe"]["router"]["jitter"], saved["model"]
    saved["moe"]["forgotten"] = 3
    check_same_run(saved, "same", tiny(), "same")
    with pytest.raises(CheckpointError, match=r"moe\.top_k=3"):
        check_same_run(saved, "same", tiny("moe.top_k=3"), "same")


def written(world: int, ep: int, micro_batch: int = 2) -> dict[str, int]:
    return {"world": world, "ep": ep, "virtual_ranks": 1, "micro_batch": micro_batch}


def test_the_same_ranks_redefine_nothing() -> None:
    assert describe_changes(written(4, 2), 4, 2, 2, tiny("moe.capacity.factor=1.25")) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["moe.capacity.factor=1.25", "moe.balance.switch=0"],
            "; capacity now goes by groups of 4 sequences, not 2",
        ),
        (["moe.balance.switch=0.01"], "; the switch loss now goes by groups of 4 sequences"),
        (
            ["moe.capacity.factor=1.25"],
            "; capacity and the switch loss now go by groups of 4 sequences",
        ),
        (
            [
                "moe.capacity.factor=1.25",
                "moe.capacity.group=sequence",
                "moe.balance.switch_level=global",
            ],
            "data order are the same",
        ),
        (["moe.balance.switch=0"], "data order are the same"),
    ],
)
def test_other_ranks_are_told_in_one_line(settings: list[str], words: str) -> None:
    line = describe_changes(written(4, 4), 2, 2, 4, tiny(*settings))
    assert line is not None
    assert line.startswith("written by 4 ranks with EP 4, goes on with 2 and EP 2: ")
    assert words in line
    assert line.endswith("(train.micro_batch=2 keeps them)") == ("by groups of" in words)
    assert "\n" not in line


def test_groups_of_the_same_size_are_the_same_groups() -> None:
    """Whoever holds them: four ranks of two sequences, or two ranks that take theirs two at a time."""
    line = describe_changes(written(4, 4), 2, 2, 2, tiny("moe.capacity.factor=1.25"))
    assert line is not None
    assert line.endswith("data order are the same")


def test_another_micro_batch_alone_is_told_too() -> None:
    """It was not: only the number of ranks was looked at, and `train.micro_batch` changed who is dropped without a word."""
    line = describe_changes(written(2, 2), 2, 2, 4, tiny("moe.capacity.factor=1.0"))
    assert line is not None
    assert line.startswith("capacity and the switch loss now go by groups of 4 sequences, not 2")
