"""`turnout train`: fine-tunes a causal language model with LoRA on attention and experts."""

from turnout.train.config import TrainConfig, TrainingFailed
from turnout.train.pipeline import run

__all__ = ["TrainConfig", "TrainingFailed", "run"]
