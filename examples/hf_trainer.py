"""A published mixture in HF's own Trainer, its experts on several ranks through dmoe.

torchrun --nproc-per-node 2 examples/hf_trainer.py MODEL TEXT OUT      (or python, on one process)

MODEL is a directory or a name on the hub, TEXT a file, OUT a directory for the trained model.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import dmoe.hf

LENGTH = 32


def main(source: str, text: str, out: str) -> None:
    """Train on the text, save the whole model, and write the losses to OUT/losses.json."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sharding = None
    if world > 1:
        dmoe.hf.register()
        sharding = DistributedConfig(fsdp_size=world, ep_size=world, ep_implementation="dmoe")
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, distributed_config=sharding
    )
    ids = AutoTokenizer.from_pretrained(source)(Path(text).read_text())["input_ids"]
    pieces = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=8 // world,
        max_steps=6,
        learning_rate=1e-2,
        adam_epsilon=1e-6,  # above the rounding of a gradient, whose sign alone AdamW would follow
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model, arguments, train_dataset=[{"input_ids": p, "labels": p} for p in pieces]
    )
    trainer.train()
    if world > 1:
        counts = dmoe.hf.expert_counts(model)  # of this rank: sum them over the ranks
        print({name: layer.choice_E.tolist() for name, layer in counts.items()})
    trainer.save_model(out)
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        Path(out, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:4])
