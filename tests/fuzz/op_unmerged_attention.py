"""Cases of unmerged_attention."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from draw import F32, Draw
from torch import Tensor

_DIMS = (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 65, 128, 130, 256)


def _by_position(
    q: Tensor, k: Tensor, v: Tensor, token_map: Tensor, rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None, causal: bool = True, scale: float | None = None,
    query_map: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Query by query."""
    maps = token_map if query_map is None else query_map
    (batch, heads, slots, dim), group = q.shape, q.shape[1] // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    offset = token_map.shape[1] - maps.shape[1]

    def rotated(x: Tensor, item: int, at: Tensor) -> Tensor:
        """[H, positions, D] to the positions `at`."""
        if rope_cos is None or rope_sin is None:
            return x
        cos, sin = (t[item % t.shape[0], at].to(x.dtype) for t in (rope_cos, rope_sin))
        width = cos.shape[1]
        left, right, rest = x.split((width, width, dim - 2 * width), -1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), -1)

    out = q.new_zeros(batch, heads, slots, v.shape[3])
    for item in range(batch):
        row = token_map[item].long()
        at = ((row >= 0) & (row < k.shape[2])).nonzero()[:, 0]
        keys = rotated(k[item][:, row[at]], item, at).repeat_interleave(group, 0)
        values = v[item][:, row[at]].repeat_interleave(group, 0)
        mine = maps[item].long()
        for slot in range(slots):
            places = (mine == slot).nonzero()[:, 0] + offset
            if not len(places) or not len(at):
                continue
            rows = rotated(q[item][:, slot, None].expand(-1, len(places), -1), item, places)
            logits = scale * rows @ keys.mT
            if causal:
                logits = logits.masked_fill(at > places[:, None], -torch.inf)
            nothing = (logits == -torch.inf).all(-1, keepdim=True)
            weights = logits.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
            out[item, :, slot] = (weights @ values).mean(1)
    return out


@op_case
def unmerged_attention(draw: Draw) -> Case:
    batch, (heads_q, heads_kv) = draw.batch(), draw.heads()
    heads_q = heads_q or heads_kv
    positions, tokens = draw.size(), draw.size()
    dim, value_dim, dtype = draw.choice(_DIMS), draw.choice(_DIMS), draw.dtype()
    some: dict[str, Any] = {}
    own = draw.choice([tokens, tokens, draw.size()])
    some["q"] = draw.floats((batch, heads_q, own, dim), dtype)
    some["k"] = draw.floats((batch, heads_kv, tokens, dim), dtype)
    some["v"] = draw.floats((batch, heads_kv, tokens, value_dim), dtype, plain=True)
    some["token_map"] = draw.indices((batch, positions), tokens)
    if draw.chance(0.6):
        shape = (draw.choice([1, batch]), positions, draw.randrange(dim // 2 + 1))
        angles = draw.floats(shape, F32, plain=True)
        some |= {"rope_cos": angles.cos(), "rope_sin": angles.sin()}
    some["causal"], some["scale"] = draw.chance(), draw.scale()
    if own != tokens or draw.chance(0.3):
        last = draw.randrange(positions + 1)
        some["query_map"] = draw.indices((batch, last), own)
    batched = ("q", "k", "v", "token_map", "rope_cos", "rope_sin", "query_map")
    return Case("unmerged_attention", some, _by_position, 5e-6, batched=batched,
                loose=("token_map", "query_map"), halves=True)  # fmt: skip
