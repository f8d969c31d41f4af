"""The ops in plain torch, at the precision of their inputs: the oracle of the tests.

Written to be read, not to be fast. Half-precision inputs are computed in float32 and the results
rounded once; float64 inputs are computed in float64 throughout.
"""

from .cluster import *
from .cluster import __all__ as _cluster
from .kv_pack import *
from .kv_pack import __all__ as _kv_pack
from .linear_attn import *
from .linear_attn import __all__ as _linear_attn
from .match import *
from .match import __all__ as _match
from .merge import *
from .merge import __all__ as _merge
from .packed_attn import *
from .packed_attn import __all__ as _packed_attn
from .score import *
from .score import __all__ as _score
from .sparse_attn import *
from .sparse_attn import __all__ as _sparse_attn
from .topk import *
from .topk import __all__ as _topk

__all__ = [
    *_cluster,
    *_kv_pack,
    *_linear_attn,
    *_match,
    *_merge,
    *_packed_attn,
    *_score,
    *_sparse_attn,
    *_topk,
]
