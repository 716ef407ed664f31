"""Plain PyTorch training: configuration, state, loop. Knows nothing of Ray, Optuna or MLflow."""

from landscape_ray.training.config import TrainConfig
from landscape_ray.training.loop import next_token_loss, train
from landscape_ray.training.state import TrainState, read_checkpoint

__all__ = ["TrainConfig", "TrainState", "next_token_loss", "read_checkpoint", "train"]
