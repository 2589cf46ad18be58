"""Train on the rollouts of an inference engine with the experts that the engine has chosen.

python examples/replay.py FOLDER

transformers generates in bfloat16, where a router rounds otherwise than in training. The experts of
every token are written as an array [tokens, layers, K], and the run trains with them.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import dmoe
from dmoe.data import DatasetSplits, open_tokenizer
from dmoe.data.sequences.token_masks import NO_MASKS, TokenMasks
from dmoe.replay import read_choices

PROMPT, NEW, SAMPLES, STEPS = 8, 25, 4, 3
LENGTH = PROMPT + NEW - 1  # tokens that are an input: all but the last


class Rollouts:
    """Generated sequences, in their order: sample i of step s is row s * SAMPLES + i."""

    seq_len, num_sequences = LENGTH, STEPS * SAMPLES

    def __init__(self, token_NS: np.ndarray) -> None:
        self.token_NS = token_NS

    def batch(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        return self.samples(step * global_batch + first, count)

    def samples(self, first: int, count: int) -> np.ndarray:
        return self.token_NS[first : first + count]

    def labels(self, step: int, first: int, count: int, global_batch: int) -> np.ndarray:
        return np.zeros(count, dtype=np.int64)

    def masks(self, step: int, first: int, count: int, global_batch: int) -> TokenMasks:
        return NO_MASKS

    def sample_masks(self, first: int, count: int) -> TokenMasks:
        return NO_MASKS

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        return np.zeros(count, dtype=np.int64)


def generate(folder: Path, prompt_NP: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the sequences, and the experts of their inputs [tokens, layers, K]."""
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.bfloat16).eval()
    layers = [[] for _ in model.model.layers]  # type: list[list[torch.Tensor]]

    def keep(layer: int) -> Any:
        rows = len(prompt_NP)
        return lambda gate, args, out: layers[layer].append(out[2].view(rows, -1, out[2].shape[1]))

    for index, block in enumerate(model.model.layers):
        block.mlp.gate.register_forward_hook(keep(index))
    torch.manual_seed(0)
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    mask_NP = torch.ones_like(prompt_NP)
    token_NS = model.generate(prompt_NP, attention_mask=mask_NP, do_sample=True, **length)
    expert_NSLK = torch.stack([torch.cat(parts, 1) for parts in layers], 2)
    return token_NS.numpy(), expert_NSLK.flatten(0, 1).numpy()


def settings(folder: Path, *more: str) -> dmoe.Config:
    small = ("model.dim=32", "model.layers=2", "model.heads=2", "moe.num_experts=8")
    run = (f"train.run_dir={folder}", "tracking.trackers=[]", "train.sample_tokens=0")
    return dmoe.load_config(None, [*small, *run, "moe.expert_dim=32", "train.device=cpu", *more])


def recorded(folder: Path) -> np.ndarray:
    return np.concatenate([read_choices(path) for path in sorted(folder.glob("*.safetensors"))])


root = Path(sys.argv[1])
texts = [f"{n} times {m} is {n * m}\n" * 8 for n in range(20) for m in range(20)]
policy = dmoe.train(settings(root / "policy", "train.steps=30"), data=texts, quiet=True)
export = ["checkpoint", "export", str(policy.path), "--to", str(root / "published")]
subprocess.run([sys.executable, "-m", "dmoe", *export], check=True)

prompts = [list(f"{n} times "[:PROMPT].encode()) for n in range(10, 10 + STEPS * SAMPLES)]
token_NS, expert_NLK = generate(root / "published", torch.tensor(prompts))
np.save(root / "choices.npy", expert_NLK)

rollouts = Rollouts(token_NS)
tokenizer = open_tokenizer(dmoe.Config().data)
splits = DatasetSplits(rollouts, rollouts, tokenizer, "rollouts of step 0", "rollouts", ("all",))
batch = (f"train.steps={STEPS}", f"train.global_batch={SAMPLES}", f"data.seq_len={LENGTH}")
given = f"moe.replay.from={root / 'choices.npy'}"
for name, more in {"own": (), "replayed": (given,)}.items():
    record = f"moe.replay.record={root / name}-choices"
    config = settings(root / name, *batch, record, *more)
    dmoe.train(config, data=splits, model=dmoe.load(policy), quiet=True)

own, replayed = recorded(root / "own-choices"), recorded(root / "replayed-choices")
other = (np.sort(own, -1) != np.sort(expert_NLK, -1)).any(-1).mean()
print(f"the trainer's router chooses other experts than the engine's for {other:.1%} of the tokens")
print("with moe.replay.from all are the engine's:", bool((replayed == expert_NLK).all()))
