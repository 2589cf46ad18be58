"""The mixture-of-experts layer: pure tensor code that never imports torch.distributed."""
