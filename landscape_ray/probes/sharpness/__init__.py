"""How sharp the loss is where the weights stand: one room for the measures that go by that name.

top.py    the largest Hessian eigenvalue
"""

from landscape_ray.probes.sharpness.top import SharpnessProbe, sharpness

__all__ = ["SharpnessProbe", "sharpness"]
