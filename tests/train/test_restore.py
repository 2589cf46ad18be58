"""Config changes that a resumed run accepts or refuses, and what other ranks redefine."""

from __future__ import annotations

import base64
import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dmoe.config.changes import describe_changes, describe_learning_rate
from dmoe.config.errors import CheckpointError
from dmoe.config.schedule import learning_rate
from dmoe.train.restore import check_same_run
from tests.tiny import tiny

SAVED: dict[str, Any] = json.loads(json.dumps(asdict(tiny())))
"""As it is read from a manifest."""


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
def test_fields_that_may_change(change: str) -> None:
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
        ("moe.top_k", "2", "3"),
        ("moe.balance.switch", "0.01", "0.5"),
        ("moe.capacity.factor", "None", "1.0"),
        ("moe.router.scale", "1.0", "2.0"),
    ],
)
def test_a_field_that_defines_the_run_is_refused_unless_accepted(
    name: str, before: str, now: str
) -> None:
    text = refusal(f"{name}={now}")
    assert text.startswith(f"{name}={now}: the checkpoint was trained with {before}; ")
    assert text.endswith(f"checkpoint.accept_changes=[{name}]")
    check(f"{name}={now}", f"checkpoint.accept_changes=[{name}]")
    check(f"{name}={now}", f"checkpoint.accept_changes=[{name.split('.')[0]}]")
    assert refusal(f"{name}={now}", "checkpoint.accept_changes=[train.stepsize]")


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("model.dim", "32", "64"),
        ("model.layers", "2", "3"),
        ("model.qk_norm", "True", "False"),
        ("model.tie_embeddings", "True", "False"),
        ("moe.num_experts", "8", "4"),
        ("moe.experts.kind", "swiglu", "relu"),
        ("moe.experts.shared", "0", "1"),
        ("moe.router.kind", "top_k", "hash"),
        ("moe.router.kind", "top_k", "noisy"),
    ],
)
def test_a_field_that_changes_the_tensors_is_never_offered(
    name: str, before: str, now: str
) -> None:
    """`checkpoint.accept_changes=[model.dim]` was offered, and then loading failed on a tensor."""
    text = refusal(f"{name}={now}")
    assert text.startswith(
        f"{name}={now}: the checkpoint was trained with {before}, whose tensors "
    )
    assert text.endswith("do not fit; use that, or another train.run_dir")
    assert refusal(f"{name}={now}", f"checkpoint.accept_changes=[{name}]") == text


def test_beside_a_change_of_tensors_another_one_is_offered_as_before() -> None:
    """Which field is to blame is found by taking back one at a time."""
    assert "do not fit" in refusal("model.layers=3", "train.seed=1")
    text = refusal(
        "model.layers=3", "train.seed=1", "checkpoint.accept_changes=[model, train.seed]"
    )
    assert text.startswith("model.layers=3: ")


def test_a_tokenizer_with_another_vocabulary_is_never_offered(tmp_path: Path) -> None:
    """The embedding has another shape; one with as many tokens may be accepted."""
    for name, extra in (("same", []), ("more", [b"th", b"he"])):
        pieces = [*(bytes([255 - byte]) for byte in range(256)), *extra]
        lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
        (tmp_path / f"{name}.tiktoken").write_text("\n".join(lines))
    change = f"data.tokenizer={tmp_path}"
    assert "do not fit" in refusal(f"{change}/more.tiktoken", data="other")
    assert "accept it with" in refusal(f"{change}/same.tiktoken", data="other")


def test_another_task_is_refused_by_its_name() -> None:
    """It was refused, and offered, as another data.source."""
    changes = ("train.task=classification", "data.source=synthetic:clusters")
    assert refusal(*changes, data="other").startswith(
        "train.task=classification: the checkpoint was trained with language_modelling, whose"
    )


def test_other_modules_cannot_be_accepted() -> None:
    """Once the refusal offered `accept_changes`, which then failed on missing tensors."""
    for change in ("modular.bank=low_rank", "modular.modules=2"):
        text = refusal("modular.bank=low_rank", change, "checkpoint.accept_changes=[modular]")
        assert text.endswith("or start another train.run_dir from this run, with modular.core")


def test_accepted_names_match_whole_words() -> None:
    assert refusal("moe.top_k=4", "checkpoint.accept_changes=[mo]")
    assert refusal("train.seed=3", "checkpoint.accept_changes=[train.see]")


def test_the_suggested_fix_keeps_what_was_accepted_before() -> None:
    """Once it named only the next field, so the first one was refused again."""
    text = refusal("train.seed=1", "moe.top_k=4", "checkpoint.accept_changes=[moe.top_k]")
    assert text.endswith("checkpoint.accept_changes=[moe.top_k,train.seed]")


def test_other_data_is_refused_by_the_fields_that_differ() -> None:
    assert refusal("data.seq_len=8", data="other").startswith(
        "data.seq_len=8: the checkpoint was trained with 16"
    )
    assert refusal(data="other").startswith(
        "data.source=synthetic:zipf: its content is not what the checkpoint was trained on"
    )
    check("checkpoint.accept_changes=[data.source]", data="other")
    # The content decides: a file that was only moved is the same tokenizer.
    check("data.tokenizer=somewhere.json")


def test_accepting_one_data_field_does_not_accept_another() -> None:
    """Once only the first of the fields that differ was checked."""
    both = ("data.source=synthetic:uniform", "data.seq_len=8")
    for accepted, missing in (("data.source", "data.seq_len"), ("data.seq_len", "data.source")):
        assert refusal(*both, f"checkpoint.accept_changes=[{accepted}]", data="other").startswith(
            f"{missing}="
        )
    check(*both, "checkpoint.accept_changes=[data.source,data.seq_len]", data="other")


def test_fields_added_and_removed_by_versions() -> None:
    """The default of a new field keeps the old meaning; a removed field is ignored."""
    saved = copy.deepcopy(SAVED)
    del saved["moe"]["router"]["jitter"], saved["model"]
    saved["moe"]["forgotten"] = 3
    check_same_run(saved, "same", tiny(), "same")
    with pytest.raises(CheckpointError, match=r"moe\.top_k=3"):
        check_same_run(saved, "same", tiny("moe.top_k=3"), "same")


def written(world: int, ep: int, micro_batch: int = 2) -> dict[str, int]:
    return {"world": world, "ep": ep, "virtual_ranks": 1, "micro_batch": micro_batch}


def test_equal_ranks_redefine_nothing() -> None:
    assert describe_changes(written(4, 2), 4, 2, 2, tiny("moe.capacity.factor=1.25").moe) is None


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
def test_other_ranks_are_described_in_one_line(settings: list[str], words: str) -> None:
    line = describe_changes(written(4, 4), 2, 2, 4, tiny(*settings).moe)
    assert line is not None
    assert line.startswith("written by 4 ranks with EP 4, goes on with 2 and EP 2: ")
    assert words in line
    assert line.endswith("(train.micro_batch=2 keeps them)") == ("by groups of" in words)
    assert "\n" not in line


def test_equal_group_sizes_redefine_nothing() -> None:
    """Four ranks of two sequences have the groups of two ranks with micro-batches of two."""
    line = describe_changes(written(4, 4), 2, 2, 2, tiny("moe.capacity.factor=1.25").moe)
    assert line is not None
    assert line.endswith("data order are the same")


def test_another_micro_batch_alone_is_described() -> None:
    """Once only the number of ranks was compared; `train.micro_batch` changes the drops too."""
    line = describe_changes(written(2, 2), 2, 2, 4, tiny("moe.capacity.factor=1.0").moe)
    assert line is not None
    assert line.startswith("capacity and the switch loss now go by groups of 4 sequences, not 2")


@pytest.mark.parametrize(
    ("changes", "step", "old", "new"),
    [
        (["train.steps=20"], 10, 2e-4, 2.28e-3),
        (["optim.lr=0.04"], 5, None, None),
        (["optim.warmup=8", "optim.schedule=linear"], 5, None, None),
        (["optim.min_lr_ratio=1.0"], 9, None, None),
        (["optim.schedule=wsd", "optim.decay_fraction=0.5"], 4, None, None),
    ],
)
def test_a_learning_rate_that_jumps_is_described(
    changes: list[str], step: int, old: float | None, new: float | None
) -> None:
    """Prolonging a finished run by `train.steps` multiplied its learning rate by eleven without a
    word: the longer schedule is still near its middle there. The line shows how to go on as it was,
    and that command really does."""
    line = describe_learning_rate(SAVED, tiny(*changes), step)
    assert line is not None
    assert set(line.partition(":")[0].split(" and ")) == set(changes)
    assert f"the learning rate of step {step + 1} is " in line
    if old is not None and new is not None:
        assert f"is {new:.3g}, not {old:.3g} as before; " in line
    command = line.partition("; ")[2].removesuffix(" keeps that one").split()
    fixed = tiny(*changes, *command)
    assert describe_learning_rate(SAVED, fixed, step) is None
    rates = {learning_rate(s, fixed.train.steps, fixed.optim) for s in range(step, step + 3)}
    assert len(rates) == 1


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ([], 5),
        (["train.steps=20"], 1),
        (["train.steps=10"], 10),
        (["optim.lr=0.00401"], 5),
        (["optim.clip=null"], 5),
    ],
)
def test_a_learning_rate_that_goes_on_is_no_note(changes: list[str], step: int) -> None:
    """Also in the warm-up, which has the same length in a longer run."""
    assert describe_learning_rate(SAVED, tiny(*changes), step) is None
