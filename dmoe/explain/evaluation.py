"""What is different in evaluation and generation."""

from __future__ import annotations

from dmoe.explain.section import Section, count
from dmoe.explain.setting import Setting


def describe(setting: Setting) -> Section:
    train, data = setting.config.train, setting.config.data
    text = setting.task.name == "language_modelling"
    unit, measure, whole = (
        ("sequence", "bits per byte", "files") if text else ("sample", "the accuracy", "samples")
    )
    when = (
        f"every {count(train.eval_every, 'step')} and at the end"
        if train.eval_every
        else "at the end"
    )
    words = [
        f"{when.capitalize()}: the mean loss over the first {count(train.eval_sequences, f'held-out {unit}')}, and {measure}; "
        f"the same number on any number of ranks. Held out: {data.holdout:.0%} of the {whole}, by a hash of their content."
    ]
    numbers = {
        "every": train.eval_every,
        "sequences": train.eval_sequences,
        "holdout": data.holdout,
        "slots": None,
    }
    if setting.layer is not None:
        slots = setting.slots(training=False).capacity
        numbers["slots"] = slots
        words.append(f"Capacity: {_capacity(setting, slots)} No noise, no auxiliary loss.")
    return Section("evaluation", "Evaluation", words, numbers)


def _capacity(setting: Setting, slots: int | None) -> str:
    moe = setting.config.moe
    if slots is not None:
        return f"factor {moe.capacity.eval_factor:g}, {count(slots, 'slot')} for a group."
    packed = (
        " and so packed, since padded slots need a capacity"
        if moe.exchange == "padded" and setting.ep > 1
        else ""
    )
    return f"none, evaluation is dropless{packed}."
