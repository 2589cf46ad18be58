"""examples/hf_trainer.py and examples/trl_sft.py: two ranks have the losses of one process."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hf.tiny_hf import save_tokenizer, tiny_directory
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ("hf_trainer.py", "trl_sft.py")


def run_scripts(rank: int, world: int, folder: str) -> None:
    """Run each example as its launcher would, both in this process."""
    os.environ.update(
        ACCELERATE_USE_CPU="1", TQDM_DISABLE="1", HF_DATASETS_CACHE=f"{folder}/cache{world}{rank}"
    )
    for script, data in zip(SCRIPTS, ("text.txt", "chats.jsonl"), strict=True):
        sys.argv = [script, f"{folder}/model", f"{folder}/{data}", f"{folder}/{script}{world}"]
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")


@pytest.mark.slow
def test_two_ranks_have_the_losses_and_weights_of_one_process(tmp_path: Path) -> None:
    tiny_directory("mixtral", tmp_path / "model", vocab_size=259)
    save_tokenizer(tmp_path / "model")
    lines = (f"line {i} of a text about numbers {i * i}.\n" for i in range(60))
    (tmp_path / "text.txt").write_text("".join(lines))
    chats = [
        [{"role": "user", "content": f"{i}+{i}?"}, {"role": "assistant", "content": str(2 * i) * (1 + i % 3)}]
        for i in range(32)
    ]  # fmt: skip
    rows = (json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "chats.jsonl").write_text("".join(rows))
    for world in (1, 2):
        run_ranks(world, run_scripts, str(tmp_path), timeout=150)
    for script in SCRIPTS:
        one, two = (tmp_path / f"{script}{world}" for world in (1, 2))
        losses = [json.loads((out / "losses.json").read_text()) for out in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=5e-6)
        assert losses[0][-1] < losses[0][0] - 0.5
        weights = [load_file(out / "model.safetensors") for out in (one, two)]
        assert (
            weights[0].keys()
            == weights[1].keys()
            == load_file(tmp_path / "model" / "model.safetensors").keys()
        )
        for name, value in weights[0].items():
            assert torch.allclose(value, weights[1][name], atol=2e-4), (script, name)
