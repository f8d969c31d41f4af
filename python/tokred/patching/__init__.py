"""Putting a method into an existing model: patch, its overrides, the state of tokens, and what
methods and patches say to each other."""

from .attention_call import AttentionCall
from .handle import Patch, apply, patch
from .overrides import Overrides
from .protocols import KeySelector, TokenReducer
from .reduction_call import LatentCall, LayerAttention, Reduced, Reduction, ReductionCall
from .settings import Settings
from .token_state import TokenState

__all__ = [
    "AttentionCall",
    "KeySelector",
    "LatentCall",
    "LayerAttention",
    "Overrides",
    "Patch",
    "Reduced",
    "Reduction",
    "ReductionCall",
    "Settings",
    "TokenReducer",
    "TokenState",
    "apply",
    "patch",
]
