"""The part of a model that is trained, in words."""

from __future__ import annotations

from dmoe.config.schema import Config


def describe_trained_part(config: Config) -> list[str]:
    """Say what is trained if it is not the whole model."""
    lora, patterns = config.model.lora, config.optim.trainable
    parts = [f"low-rank factors of rank {lora.rank} (LoRA)"] if lora.rank else []
    parts += [f"parameters named {', '.join(patterns)}"] if patterns else []
    return [f"Trained: {' and '.join(parts)}; all else keeps its values."] if parts else []
