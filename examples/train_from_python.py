"""Train from Python with a callback that stops the run, and use the model.

python examples/train_from_python.py RUN_DIRECTORY
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch

import dmoe


class EarlyStop(dmoe.Callback):
    """Saves and stops the run once the validation loss does not fall any more."""

    best, rising = float("inf"), False

    def on_evaluate(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.rising = metrics["loss"] >= self.best
        self.best = min(self.best, metrics["loss"])

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> bool:
        return self.rising


config = dmoe.load_config(
    None,
    [
        *("model.dim=32", "model.layers=1", "model.heads=2", "moe.num_experts=4"),
        *("moe.expert_dim=32", "data.seq_len=32", "train.steps=40", "train.eval_every=5"),
        *("optim.lr=0.5", "optim.warmup=0", "tracking.trackers=[]", f"train.run_dir={sys.argv[1]}"),
    ],
)
texts = [f"{n} times {m} is {n * m}\n" * 8 for n in range(20) for m in range(20)]
run = dmoe.train(config, callbacks=[EarlyStop()], data=texts, quiet=True)
for line in run.metrics.of("eval"):
    print(f"step {line['step']}: {line['loss']:.2f}")
print("stopped early:", run.stopped, "| newest checkpoint:", run.checkpoint().name)

model = dmoe.load(run)  # or run.model, which is the same
with torch.no_grad():
    logits = model(torch.tensor([list(b"3 times 4 is ")])).logits
assert logits is not None
print("after '3 times 4 is ':", bytes([int(logits[0, -1].argmax())]))
