"""Models by name. Each is a configuration class and a module that counts its own parameters and FLOPs."""

from landscape_ray.models.gpt import GPT, GPTConfig

MODELS = {"gpt": GPT}

__all__ = ["GPT", "MODELS", "GPTConfig"]
