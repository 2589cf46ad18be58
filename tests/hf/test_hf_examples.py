"""The examples of published models: two ranks have the losses of one process."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hf.tiny_hf import save_tokenizer, tiny_directory
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = {
    "hf_trainer.py": "text.txt",
    "trl_sft.py": "chats.jsonl",
    "lora_sft.py": "chats.jsonl",
}
"""Each script and its data."""


def run_scripts(rank: int, world: int, folder: str) -> None:
    """Run each example as its launcher would, both in this process."""
    os.environ.update(
        ACCELERATE_USE_CPU="1", TQDM_DISABLE="1", HF_DATASETS_CACHE=f"{folder}/cache{world}{rank}"
    )
    for script, data in SCRIPTS.items():
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
        name = "adapter_model.safetensors" if script == "lora_sft.py" else "model.safetensors"
        weights = [load_file(out / name) for out in (one, two)]
        assert weights[0].keys() == weights[1].keys()
        if name == "model.safetensors":
            assert weights[0].keys() == load_file(tmp_path / "model" / name).keys()
        for tensor, value in weights[0].items():
            assert torch.allclose(value, weights[1][tensor], atol=2e-4), (script, tensor)


@pytest.mark.slow
def test_continued_pretraining_ends_in_a_published_model(tmp_path: Path) -> None:
    """The example trains, exports, and the result loads in transformers and generates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_directory("mixtral", tmp_path / "model", vocab_size=259)
    save_tokenizer(tmp_path / "model")
    lines = (f"line {i} of a text about numbers {i * i}.\n" for i in range(400))
    (tmp_path / "text.txt").write_text("".join(lines))
    script = ROOT / "examples" / "continue_pretraining.py"
    arguments = [tmp_path / name for name in ("model", "text.txt", "run", "out")]
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "65 tensors in" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out")("line", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape == (1, 6)
    first = load_file(tmp_path / "model" / "model.safetensors")
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(value, first[name]) for name, value in trained.items())
