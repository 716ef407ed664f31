"""Symmetric matrices over the weights, known by their products with vectors.

operator.py        CurvatureOperator: what the solvers of `spectrum` take
hessian.py         the Hessian, exactly and by differences of gradients
"""

from landscape_ray.probes.operators.hessian import FiniteDifferenceHessian, HessianOperator
from landscape_ray.probes.operators.operator import CurvatureOperator

__all__ = ["CurvatureOperator", "FiniteDifferenceHessian", "HessianOperator"]
