"""Instruction tuning of a published mixture with TRL's SFTTrainer, its experts on several ranks.

torchrun --nproc-per-node 2 examples/trl_sft.py MODEL CHATS OUT        (or python, on one process)

CHATS is a JSONL file of {"messages": [{"role": ..., "content": ...}, ...]}. Only the answers are
trained: the model's chat template marks them with {% generation %}.
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig
from trl import SFTConfig, SFTTrainer

import dmoe.hf


def main(source: str, chats: str, out: str) -> None:
    """Train on the chats, save the whole model, and write the losses to OUT/losses.json."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sharding = None
    if world > 1:
        dmoe.hf.register()
        sharding = DistributedConfig(fsdp_size=world, ep_size=world, ep_implementation="dmoe")
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, distributed_config=sharding
    )
    rows = [json.loads(line) for line in Path(chats).read_text().splitlines()]
    arguments = SFTConfig(
        output_dir=out,
        per_device_train_batch_size=8 // world,
        max_steps=4,
        learning_rate=1e-2,
        adam_epsilon=1e-6,  # above the rounding of a gradient, whose sign alone AdamW would follow
        max_length=64,
        assistant_only_loss=True,
        # transformers' auxiliary loss is that of each rank's own tokens: with it, two ranks would
        # train with another loss than one process
        router_aux_loss_coef=0.0,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
    )
    trainer.train()
    trainer.save_model(out)
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        Path(out, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:4])
