"""Eigenvalues, traces and densities of symmetric operators. The functions are imported from their files.

lanczos.py            extremal eigenpairs, with error bounds; krylov.py: the iteration
eigenpairs.py         the largest and smallest eigenvalues of a curvature matrix, the condition number
parts.py              the same for each layer and each class
density.py            the spectral density; quadrature.py: with trace, norm, bulk and outliers from the same products
batch_size.py         how the largest eigenvalues depend on the size of the batch
trace.py              trace and Frobenius norm; trace_estimators.py, subspace.py, sign_samples.py: their parts
split_trace.py        trace of the Hessian: of the Gauss-Newton matrix, and of the rest
diagonal.py           the diagonal
ggn_trace.py          trace of the Gauss-Newton matrix, nearly free; ghost_norms.py: norms without gradients
"""
