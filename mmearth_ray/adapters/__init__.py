"""Exported encoders in other packages' terms: one module per package, which needs that package and nothing else does."""
