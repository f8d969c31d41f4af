// Shapes for the launch plans of the match ops.
#pragma once

#include "common/cuda/chunk.cuh"
#include "common/cuda/launch.h"
#include "match/cuda/plan.h"
#include "match/params.h"

namespace tokred::cuda::matching {

inline bool has_aligned_rows(const TokenSet& set) {
  return is_aligned(set.data, set.stride_batch | set.stride_token, 2);
}

inline MatchShape shape_of(const MatchParams& p) {
  return {p.batch, p.a.count, p.dtype == DType::f32, has_aligned_rows(p.a) && has_aligned_rows(p.b),
          p.band >= 0 || p.k > 1 || p.a.weight || p.b.weight};
}

// Whether match_short_kernel takes them.
inline bool is_short(const MatchParams& p) {
  const MatchShape shape = shape_of(p);
  return shape.async() && !shape.general && p.channels <= kSimilarityChannels;
}

}  // namespace tokred::cuda::matching
