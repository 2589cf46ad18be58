"""Published models: mixtures of the `transformers` library, trained and distributed by dmoe.

`moefy` makes the MoE blocks of a live model dmoe's own layers, in place. `transformers` is an
optional extra (`pip install 'dmoe[models]'`) and is imported only where it is needed.
"""

from dmoe.hf.layer import Forward
from dmoe.hf.moefy import auxiliary_loss, forward_of, moefied_layers, moefy
from dmoe.hf.plugin import ExpertCounts, expert_counts, register

__all__ = [
    "ExpertCounts",
    "Forward",
    "auxiliary_loss",
    "expert_counts",
    "forward_of",
    "moefied_layers",
    "moefy",
    "register",
]
