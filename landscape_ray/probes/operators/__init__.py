"""Symmetric matrices over the weights, known by their products with vectors.

operator.py        CurvatureOperator: what the solvers of `spectrum` take
hessian.py         the Hessian, exactly and by differences of gradients; kinks.py: what makes those see no kink
checked.py         differences where one of them agrees with an exact product
gauss_newton.py    the generalised Gauss-Newton matrix; jacobian.py: products with the Jacobian of the outputs
fisher.py          the Fisher matrix by sampled labels, and the empirical one
transforms.py      D A D: preconditioned, and scaled by the weights
blocks.py          the weights of each layer, the examples of each class
"""

from landscape_ray.probes.operators.blocks import ClassPart, by_class, layers
from landscape_ray.probes.operators.fisher import EmpiricalFisher, SampledFisher
from landscape_ray.probes.operators.gauss_newton import GGNOperator
from landscape_ray.probes.operators.hessian import FiniteDifferenceHessian, HessianOperator
from landscape_ray.probes.operators.operator import CurvatureOperator
from landscape_ray.probes.operators.transforms import Preconditioned, Scaled

__all__ = [
    "ClassPart",
    "CurvatureOperator",
    "EmpiricalFisher",
    "FiniteDifferenceHessian",
    "GGNOperator",
    "HessianOperator",
    "Preconditioned",
    "SampledFisher",
    "Scaled",
    "by_class",
    "layers",
]
