"""How the global batch is cut."""

from __future__ import annotations

from dmoe.training.explanation.section import Section, count, many
from dmoe.training.explanation.setting import Setting

__all__ = ["describe"]


def describe(setting: Setting) -> Section:
    train, length, cut = setting.config.train, setting.config.data.seq_len, setting.batching
    virtual, step_tokens = (
        setting.config.parallel.virtual_ranks,
        setting.config.train.global_batch * setting.config.data.seq_len,
    )
    words = [
        f"{count(train.global_batch, 'sequence')} of {count(length, 'token')} a step = {count(setting.world, 'rank')} x "
        f"{count(virtual, 'virtual rank')} x {cut.micro_batch} in a micro-batch x {cut.accumulation} accumulated: "
        f"{step_tokens:,} tokens a step, {many(step_tokens * train.steps)} in {count(train.steps, 'step')}.",
        f"One forward of one process sees {setting.tokens:,} tokens ({count(setting.sequences, 'sequence')}). Which sequences a step "
        "reads depends on the seed and the step alone, not on the number of ranks.",
    ]
    numbers = {
        "world": setting.world,
        "virtual_ranks": virtual,
        "micro_batch": cut.micro_batch,
        "accumulation": cut.accumulation,
        "global_batch": train.global_batch,
        "seq_len": length,
        "tokens_per_step": step_tokens,
        "tokens_per_forward": setting.tokens,
        "steps": train.steps,
        "tokens": step_tokens * train.steps,
    }
    return Section("batch", "Batch", words, numbers)
