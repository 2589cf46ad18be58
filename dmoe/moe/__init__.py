"""The mixture-of-experts layer. Pure tensor code: nothing here imports torch.distributed or knows a rank."""
