"""Scaling laws: what a table of finished runs says about other sizes, horizons and budgets."""
