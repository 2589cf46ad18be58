"""Reference implementation of the MoE layer and of adapters: formulas, loops and dense sums."""
