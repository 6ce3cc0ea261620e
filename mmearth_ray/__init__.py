"""mmearth-ray: pretrain Earth-observation encoders (MP-MAE on MMEarth) at any scale on Ray."""

__version__ = "0.1.0"
