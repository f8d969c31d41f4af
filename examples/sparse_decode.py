"""One decoded token that attends to chosen keys, with the ops alone: score, choose, attend.

python examples/sparse_decode.py
"""

from __future__ import annotations

import torch

import tokred

torch.manual_seed(0)
B, Hq, Hkv, N, D, K = 1, 32, 8, 8192, 128, 256
query = torch.randn(B, Hq, 1, D)
key, value = torch.randn(2, B, Hkv, N, D)
# A few keys that the query looks for, as in a trained model.
key[:, :, ::64] += 2 * query.view(B, Hkv, Hq // Hkv, D).mean(2, keepdim=True)

# 1. Score every key by the mean logit of its group of query heads: [B, Hkv, N].
scores = tokred.qk_score(query, key, reduce="group_mean")

# 2. Choose K of them, the first 4 and the last 32 always: int32 [B, Hkv, K], ascending.
_, chosen = tokred.topk(scores, K, order="position", num_sinks=4, num_locals=32)

# 3. Attend to the chosen keys, where they lie: nothing is gathered in memory.
out, lse = tokred.sparse_attention(query, key, value, chosen[:, :, None])

exact, exact_lse = tokred.biased_attention(query, key, value)
share = (lse - exact_lse).exp()
print(f"{K} of {N} keys, {share.mean():.0%} of the attention weight")
print(f"cosine to dense attention: {torch.cosine_similarity(out, exact, dim=-1).mean():.3f}")

# The keys that were left out, attended to on their own, give the rest: two parts are combined by
# their log-sum-exps.
left_out = torch.ones(B, Hkv, N, dtype=torch.bool).scatter(-1, chosen.long(), False)
rest, _ = tokred.compact(left_out)
out_rest, lse_rest = tokred.sparse_attention(query, key, value, rest[:, :, None])
both, _ = tokred.combine_states(out, lse, out_rest, lse_rest)
print(f"both parts against dense attention: {(both - exact).abs().max():.1e}")
