"""`dmoe.hf.save_pretrained` on four ranks: each rank writes its own experts only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import dmoe
from dmoe.config.errors import CheckpointError
from dmoe.distributed.mesh import ParallelMesh
from dmoe.hf import export, save
from dmoe.hf.published import PublishedDirectory
from tests.hf.test_export import make_source
from tests.ranks import run_ranks

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "granitemoe")
MODES = {
    "mixtral": (("ddp", 4), ("fsdp", 2)),
    "deepseek_v3": (("fsdp", 2),),
    "gpt_oss": (("ddp", 2), ("fsdp", 2)),
    "granitemoe": (("ddp", 4),),
}
"""Mode and EP size that each is saved from."""
STACKED = ("gpt_oss", "granitemoe")


def save_on_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Save each family from DDP and from FSDP2; then a save that fails on the last rank."""
    from transformers import AutoModelForCausalLM

    found: dict[str, Any] = {}
    for family in FAMILIES:
        for mode, ep in MODES[family]:
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/{family}", dtype=torch.float32)
            whole = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
            parallel = dmoe.parallelize(dmoe.moefy(model), ep=ep, mode=mode)
            gathered: list[int] = []
            right = save.gather_full

            def counted(values: Any, experts: Any, *args: Any) -> Any:
                gathered.append(sum(v.numel() for n, v in values.items() if n in experts))  # noqa: B023
                return right(values, experts, *args)  # noqa: B023

            save.gather_full = counted
            out = Path(folder) / f"{family}-{mode}-{world}"
            done = dmoe.hf.save_pretrained(parallel, out, max_shard_bytes=60_000)
            save.gather_full = right
            found[f"{family}-{mode}"] = (sum(gathered), whole, done is not None and done.files)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/mixtral", dtype=torch.float32)
    parallel = dmoe.parallelize(dmoe.moefy(model), ep=2)
    if rank == world - 1:

        def full(*args: Any) -> None:
            raise OSError("no space left on device")

        save.ShardWriter.flush = full  # type: ignore[method-assign]
    try:
        dmoe.hf.save_pretrained(parallel, Path(folder) / "failed")
    except CheckpointError as error:
        found["failed"] = str(error)
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.ranks
def test_each_rank_writes_its_own_experts(tmp_path: Path) -> None:
    """The bytes of the source; no expert is gathered but in stacked families; all or nothing."""
    for family in FAMILIES:
        make_source(family, tmp_path / family, mtp=family == "deepseek_v3")
    world = 4
    results = run_ranks(world, save_on_ranks, str(tmp_path), timeout=120)
    for family in FAMILIES:
        source = tensors(tmp_path / family)
        for mode, _ in MODES[family]:
            out = tmp_path / f"{family}-{mode}-{world}"
            ours = tensors(out)
            assert ours.keys() == source.keys() == PublishedDirectory(out).tensors.keys()
            for name, value in source.items():
                assert torch.equal(ours[name], value), (family, mode, name)
            assert (out / "tokenizer.json").is_file()
            gathered, whole, files = results[0][f"{family}-{mode}"]
            assert files > 1
            assert (gathered > 0) == (family in STACKED)
            assert whole > 0
    for rank, result in enumerate(results):
        assert "no space left on device" in result["failed"], rank
        assert f"on rank {world - 1}" in result["failed"]
    assert not (tmp_path / "failed").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_one_process_saves_alike_and_refuses_a_model_without_a_source(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_source("mixtral", tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    done = dmoe.hf.save_pretrained(dmoe.moefy(model), tmp_path / "out")
    assert done is not None
    assert all(torch.equal(v, tensors(source)[n]) for n, v in tensors(tmp_path / "out").items())
    assert ParallelMesh().world_size == 1
    model.config._name_or_path = ""
    with pytest.raises(dmoe.ConfigError, match="does not say from which directory"):
        dmoe.hf.save_pretrained(model, tmp_path / "other")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    """`dmoe checkpoint export`, also with --adapter, ended in a traceback of the write."""
    out = tmp_path / "out"
    export.reserve(out)

    def write() -> None:
        with export.commit(out) as folder:
            (folder / "half").write_bytes(b"x")
            raise error

    with pytest.raises(CheckpointError, match=r"writing .*/out failed: .*; nothing of it is left"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "is a directory that exists"),
        ("x" * 250, "cannot be created .File name too long"),
        ("x" * 300, "cannot be created .File name too long"),
    ],
)
def test_a_directory_that_cannot_be_created(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each was a traceback: of `--to .` in an empty directory, and of the system's refusal."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dmoe.ConfigError, match=words):
        export.reserve(Path(name))
    assert list(tmp_path.iterdir()) == []
