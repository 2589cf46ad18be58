"""How the global batch is cut."""

from __future__ import annotations

from dmoe.explain.section import Section, count, many
from dmoe.explain.setting import Setting


def describe(setting: Setting) -> Section:
    train, task, cut = setting.config.train, setting.task, setting.batching
    virtual, step_tokens = (
        setting.config.parallel.virtual_ranks,
        setting.config.train.global_batch * task.targets,
    )
    unit = task.unit if task.targets == 1 else "sequence"
    samples = count(train.global_batch, unit)
    of_each = "" if task.targets == 1 else f" of {count(task.targets, task.unit)}"
    words = [
        f"{samples}{of_each} a step = {count(setting.world, 'rank')} x "
        f"{count(virtual, 'virtual rank')} x {cut.micro_batch} in a micro-batch x {cut.accumulation} accumulated: "
        f"{step_tokens:,} {task.unit}s a step, {many(step_tokens * train.steps)} in {count(train.steps, 'step')}.",
        f"One forward of one process sees {setting.tokens:,} {task.unit}s ({count(setting.sequences, unit)}). Which {unit}s a step "
        "reads depends on the seed and the step alone, not on the number of ranks.",
    ]
    if task.targets == 1:
        words.append(
            "For the layers a sample is a sequence of one token, or of one token for each stream under model.fusion=gated."
        )
    numbers = {
        "world": setting.world,
        "virtual_ranks": virtual,
        "micro_batch": cut.micro_batch,
        "accumulation": cut.accumulation,
        "global_batch": train.global_batch,
        "seq_len": task.targets,
        "tokens_per_step": step_tokens,
        "tokens_per_forward": setting.tokens,
        "steps": train.steps,
        "tokens": step_tokens * train.steps,
    }
    return Section("batch", "Batch", words, numbers)
