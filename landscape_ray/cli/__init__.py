"""The command line.

app.py      the verbs
checks.py   the studies of `landscape-ray check`
shared.py   options, the console, sweeps by name
"""

from landscape_ray.cli.app import app, main

__all__ = ["app", "main"]
