"""Ranks, groups and collectives: the only package that imports torch.distributed."""
