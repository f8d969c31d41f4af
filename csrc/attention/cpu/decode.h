// Few (query, head) rows against many keys: which calls of biased_attention go that way.
#pragma once

#include "common/cpu/parallel.h"
#include "sparse_attn/params.h"

namespace tokred::TOKRED_ISA {

// Up to so many rows of a kv head are worked on row by row, more in panels. A function of the sizes
// of one sequence, so that a batch does not change the result.
inline bool is_decode(const AttentionParams& p) {
  constexpr int64_t kMostRows = 8;
  return p.queries * (p.heads_q / p.heads_kv) <= kMostRows && !p.blocks.mask.data;
}

// All keys in order, as the one list of all queries.
inline SparseAttentionParams over_all_keys(const AttentionParams& p) {
  return {p, KeyLists{nullptr, 0, 0, 0, 1, p.keys, p.queries > 0 ? p.queries : 1}, Rotation{}};
}

int64_t sparse_attention_workspace(const SparseAttentionParams&, const Parallel&);
void sparse_attention(const SparseAttentionParams&, const Parallel&);

}  // namespace tokred::TOKRED_ISA
