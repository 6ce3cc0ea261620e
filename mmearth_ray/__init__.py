"""mmearth-ray: pretrain Earth-observation encoders (MP-MAE on MMEarth) at any scale on Ray.

encoder = mmearth_ray.load_encoder("runs/embedded")       # an exported model, a run, a checkpoint
encoder = mmearth_ray.create_encoder("atto", patch_size=8)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmearth_ray.checkpoints.load import load_encoder
    from mmearth_ray.model.dense import create_encoder

__version__ = "0.1.0"
__all__ = ["__version__", "create_encoder", "load_encoder"]

_PLACES = {"create_encoder": "mmearth_ray.model.dense", "load_encoder": "mmearth_ray.checkpoints.load"}


def __getattr__(name: str) -> Any:
    """Looked up when asked for, so that importing the package does not import PyTorch."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'mmearth_ray' has no attribute '{name}'")
