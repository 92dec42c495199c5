"""Training: step, optimizer, checkpoints, metrics, and the trainer that joins them."""

from sightline.training.errors import NonFiniteLoss, RunEnded, RunFailed, SaveFailed, Stopped
from sightline.training.step import prepare_batch
from sightline.training.trainer import Trainer, train

__all__ = ["NonFiniteLoss", "RunEnded", "RunFailed", "SaveFailed", "Stopped", "Trainer", "prepare_batch", "train"]
