"""Training: step, optimizer, checkpoints, metrics and the trainer."""
