"""timm beside a CPU build of PyTorch.

timm imports torchvision, whose compiled operators are built for one build of PyTorch and do not load beside another; the
module that registers them then fails.  timm's models use none of them, so an empty module takes its place.
"""

import sys
from types import ModuleType

sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))

import timm  # noqa: E402

__all__ = ["timm"]
