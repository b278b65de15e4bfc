"""The model as mathematics on one device: attention, router, experts, losses. Never imports torch.distributed."""
