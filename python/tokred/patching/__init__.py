"""Putting a method into an existing model: patch, its overrides, and the state of tokens."""

from .handle import Patch, apply, patch
from .overrides import Overrides
from .settings import Settings
from .token_state import TokenState

__all__ = ["Overrides", "Patch", "Settings", "TokenState", "apply", "patch"]
