// The shape and the tiles of attention_rows and attention_columns.
#pragma once

#include "common/cuda/launch.h"
#include "score/cuda/attention_tile.cuh"

namespace tokred::cuda::scoring {

inline ScoreShape score_shape(const AttentionParams& p) {
  return {p.batch, p.heads_q, p.heads_kv, p.queries, p.keys, p.head_dim, p.dtype == DType::f32};
}

// f.template operator()<AttentionConfig>() for the dtype and head size.
template <class F>
void visit_config(const AttentionParams& p, F f) {
  visit_dtype(p.dtype, [&]<class T>() {
    visit_head_dim(p.head_dim,
                   [&]<int kDim>() { f.template operator()<AttentionConfig<T, kDim>>(); });
  });
}

}  // namespace tokred::cuda::scoring
