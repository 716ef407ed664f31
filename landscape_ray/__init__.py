"""Hyperparameter search and population training on Ray that understands the loss landscape it moves in.

The package root imports nothing heavy: `landscape_ray.laws` needs numpy and scipy only, `landscape_ray.probes` and
`landscape_ray.training` need torch; Ray and Optuna are imported by `landscape_ray.sweep` alone, MLflow and pyarrow by
`landscape_ray.tracking`, plotting libraries by `landscape_ray.reports`.
"""

__version__ = "0.1.0"
