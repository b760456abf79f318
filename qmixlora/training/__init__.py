"""Training: a run, its Trainer and callbacks, out-of-memory recovery, the memory probe."""

from .adapt import train_within_memory
from .run import train
from .trainer import SupervisedTrainer, make_trainer

__all__ = ["SupervisedTrainer", "make_trainer", "train", "train_within_memory"]
