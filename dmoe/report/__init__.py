"""The report on a run, or on several beside each other: one HTML file that needs no network.

It reads a run directory's `metrics.jsonl` and `resolved.yaml`, never a checkpoint, and does not import torch.
"""

from dmoe.report.build import write_report

__all__ = ["write_report"]
