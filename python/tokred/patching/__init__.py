"""Putting a method into an existing model: patch, its overrides, the state of tokens, and what
methods and patches say to each other."""

from .attention_call import AttentionCall
from .eviction_call import Eviction, EvictionCall, Replacement
from .handle import Patch, apply, patch
from .overrides import Overrides
from .prompt_call import LayerStates, PromptCall, PromptTokens
from .protocols import KeyEvictor, KeySelector, PromptPruner, TokenReducer, VisualReducer
from .reduction_call import LatentCall, LayerAttention, Reduced, Reduction, ReductionCall
from .settings import Settings
from .token_state import TokenState
from .visual_call import EncoderStates, Layout, VisualCall, VisualReduction, VisualTokens

__all__ = [
    "AttentionCall",
    "EncoderStates",
    "Eviction",
    "EvictionCall",
    "KeyEvictor",
    "KeySelector",
    "LatentCall",
    "LayerAttention",
    "LayerStates",
    "Layout",
    "Overrides",
    "Patch",
    "PromptCall",
    "PromptPruner",
    "PromptTokens",
    "Reduced",
    "Reduction",
    "ReductionCall",
    "Replacement",
    "Settings",
    "TokenReducer",
    "TokenState",
    "VisualCall",
    "VisualReducer",
    "VisualReduction",
    "VisualTokens",
    "apply",
    "patch",
]
