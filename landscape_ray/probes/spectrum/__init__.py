"""Eigenvalues, traces and densities of symmetric operators.

lanczos.py    extremal eigenpairs, with error bounds
"""
