"""Parts of the training loop: configuration, optimizer, step, checkpoint, metrics, tracking, reports."""
