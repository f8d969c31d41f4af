// Launches that the ops of sparse_attn share.
#pragma once

#include "common/cuda/launch.h"
#include "sparse_attn/params.h"

namespace tokred::cuda {

// Dense attention as one list of all keys: null indices.
inline SparseAttentionParams dense_lists(const AttentionParams& p) {
  return {p, {nullptr, 0, 0, 0, p.heads_kv, p.keys, p.queries}, {}};
}

// Whether biased_attention has so few rows that decode_attention takes it.
bool is_decode_attention(const AttentionParams&);

// The wgmma kernel of biased_attention, and whether it is on and takes a call.
bool is_wgmma_attention(const AttentionParams&);
void wgmma_attention(const AttentionParams&, Stream);

// Recomputes rows that are NaN, and the gradients of such rows and keys, from the visible pairs
// alone; see attention/cuda/recompute.cuh. Lists without indices are all keys in order.
void recompute_rows(const SparseAttentionParams&, bool marked, Stream);
void recompute_gradients(const AttentionBackwardParams&, const KeyLists&, Stream);

// Attention over lists of keys, or over all keys where the lists have no indices.
void decode_attention(const SparseAttentionParams&, Stream);
int64_t decode_attention_workspace(const SparseAttentionParams&);  // bytes

}  // namespace tokred::cuda
