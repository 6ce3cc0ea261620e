"""Comparisons of encoders: points, baselines, tables, label efficiency."""
