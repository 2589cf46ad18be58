"""Instruction tuning with LoRA on attention and all experts, in a training loop of your own.

torchrun --nproc-per-node 2 examples/lora_sft.py MODEL CHATS OUT       (or python, on one process)

CHATS is a JSONL file of {"messages": [...]}; only the answers are trained. OUT becomes a directory
that peft.PeftModel.from_pretrained loads.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import dmoe.hf

BATCH, STEPS = 8, 4


def samples_of(chats: str, source: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return ids and labels of each chat; -100 marks what is not trained."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    samples = []
    for line in Path(chats).read_text().splitlines():
        both = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor(both["input_ids"]), torch.tensor(both["assistant_masks"])
        assert mask.any(), "the chat template does not mark answers with {% generation %}"
        samples.append((ids, ids.masked_fill(mask == 0, -100)))
    return samples


def main(source: str, chats: str, out: str) -> None:
    """Train and save the factors, and write the losses to OUT/losses.json."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group()
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dmoe.hf.add_lora(dmoe.moefy(model), rank=8, targets=["q_proj", "v_proj", "experts"])
    parallel = dmoe.parallelize(model.train(), ep=world)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-6
    )
    samples, losses = samples_of(chats, source), []
    for step in range(STEPS):
        batch = samples[step * BATCH : (step + 1) * BATCH]
        length = max(len(ids) for ids, _ in batch)
        trained = sum(int((labels[1:] != -100).sum()) for _, labels in batch)
        ids = torch.zeros(BATCH, length, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (own, target) in enumerate(batch):
            ids[row, : len(own)], labels[row, : len(own)], mask[row, : len(own)] = own, target, 1
        own_rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        logits = parallel(input_ids=ids[own_rows], attention_mask=mask[own_rows]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[own_rows, 1:].flatten(), reduction="sum"
        )
        # the mean over the answers of all ranks; parallelize takes the mean over the ranks
        loss = loss * world / trained
        parallel.backward(loss)
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    dmoe.hf.save_lora(parallel, out)
    if rank == 0:
        Path(out, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:4])
