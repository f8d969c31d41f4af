"""What unmerged_attention refuses."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 3)
MAP, ANGLES = torch.zeros(2, 9, dtype=torch.int32), torch.zeros(1, 9, 4)
OK = (Q, K, V, MAP)
unmerged = tokred.unmerged_attention

test_unmerged_attention = names_the_argument(
    [
        (unmerged, (Q[0], K, V, MAP), {}, "q must have 4 dimensions"),
        (unmerged, (Q.double(), K.double(), V.double(), MAP), {}, "q must be float32, float16"),
        (unmerged, (Q, K.half(), V, MAP), {}, "k must have the dtype of q"),
        (unmerged, (Q, K[..., :4], V, MAP), {}, "k must"),
        (unmerged, (Q[:, :3], K, V, MAP), {}, "the heads of q must be a multiple"),
        (unmerged, (Q, K, V[:, :, :4], MAP), {}, "v must have the batch, heads and keys of k"),
        (unmerged, (Q, K, V, MAP[0]), {}, "token_map must have 2 dimensions"),
        (unmerged, (Q, K, V, MAP[:1]), {}, r"token_map must be \[B, N\]"),
        (unmerged, (Q, K, V, MAP.short()), {}, "token_map must be int32"),
        (unmerged, OK, {"query_map": MAP.short()}, "query_map must be int32"),
        (unmerged, OK, {"query_map": MAP[:1]}, r"query_map must be \[B, L\]"),
        (
            unmerged,
            (Q, K, V, MAP[:, :4]),
            {"query_map": MAP},
            "query_map must be of the last positions, at most N = 4",
        ),
        (unmerged, OK, {"rope_cos": ANGLES}, "rope_cos and rope_sin must be given together"),
        (unmerged, OK, {"rope_cos": ANGLES[0], "rope_sin": ANGLES}, "rope_cos must have 3"),
        (
            unmerged,
            OK,
            {"rope_cos": ANGLES[:, :4], "rope_sin": ANGLES},
            r"rope_cos must be \[B | 1, N, R\]".replace("|", r"\|"),
        ),
        (
            unmerged,
            OK,
            {"rope_cos": torch.zeros(1, 9, 5), "rope_sin": ANGLES},
            "R at most D / 2 = 4",
        ),
        (
            unmerged,
            OK,
            {"rope_cos": ANGLES, "rope_sin": ANGLES[..., :3]},
            "rope_sin must have the shape of rope_cos",
        ),
        (unmerged, OK, {"rope_cos": ANGLES.half(), "rope_sin": ANGLES}, "rope_cos must be float32"),
        (unmerged, OK, {"scale": float("inf")}, "scale must be finite"),
    ]
)
