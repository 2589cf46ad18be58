"""Prefixes (Li and Liang 2021). Input composition at every layer: P learned keys and values that every later position attends to.

    k[b, s] = sum over the chosen m of weight[b, m] * key_m[s],   v alike,   for s < P

Attached to what computes keys and values, by layer: for a Hugging Face model a bank on each `k_proj` and `v_proj`; for the reference
transformer, whose `w_qkv` stacks queries, keys and values, with `columns=(first, last + 1)` of the keys and values. Room is made as
for a prompt (`prompt.py`), whose rules and costs these are. What stands at the placeholders' positions is read by nobody, since
their keys and values are overwritten in every layer. Keys are written before the rotation, which at a fixed position is a fixed turn
of the learned key.
"""

from __future__ import annotations

from dmoe.modular.banks.prompt import Prompt

__all__ = ["Prefix"]


class Prefix(Prompt):
    """A prompt that is written into keys and values: attach it to what computes them, in every layer. Arguments as `Prompt`."""
