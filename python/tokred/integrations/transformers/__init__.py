"""transformers: its attention on tokred's kernels, vision models that merge tokens, decoders that
choose keys, and what a packed cache passes to them.

Importing it is all that model.set_attn_implementation("tokred") needs.
"""

from . import attention
from .press import PressAdapter

__all__ = ["PressAdapter", "attention"]
