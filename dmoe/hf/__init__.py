"""Published models: mixtures of the `transformers` library, trained and distributed by dmoe.

`moefy` makes the MoE blocks of a live model dmoe's own layers, in place. `register` makes dmoe an
expert-parallel implementation of transformers, for HF Trainer and TRL. `transformers` is an
optional extra (`pip install 'dmoe[models]'`) and is imported only where it is needed.
"""

from dmoe.hf.layer import Forward
from dmoe.hf.lora import add_lora, merge_lora
from dmoe.hf.lora_peft import load_lora, save_lora
from dmoe.hf.moefy import auxiliary_loss, forward_of, moefied_layers, moefy
from dmoe.hf.plugin import ExpertCounts, expert_counts, register
from dmoe.hf.save import save_pretrained

__all__ = [
    "ExpertCounts",
    "Forward",
    "add_lora",
    "auxiliary_loss",
    "expert_counts",
    "forward_of",
    "load_lora",
    "merge_lora",
    "moefied_layers",
    "moefy",
    "register",
    "save_lora",
    "save_pretrained",
]
