// Parameters of the cluster kernels. Every pointer carries its shape.
#pragma once

#include "common/types.h"

namespace tokred {

// A token of a grid is joined to its right and to its lower neighbour where their distance is less
// than `threshold` and neither is masked; l2: |a - b|, cosine: 1 - cos(a, b). Labels number the
// connected components by the position of their first member, row by row; a masked token has -1.
// NaN joins nothing.
struct ConnectedComponentsParams {
  const void* x;     // dtype [B, H, W, C], channels contiguous
  int64_t stride_batch, stride_row, stride_column;
  const bool* mask;  // bool [B, H * W] or null
  int64_t mask_stride_batch, mask_stride_token;
  int64_t batch, height, width, channels;
  DType dtype;
  Metric metric;     // l2 or cosine
  float threshold;
  int32_t* labels;   // i32 [B, H * W]
  int32_t* counts;   // i32 [B], components
  void* workspace;   // connected_components_workspace(params) bytes
};

}  // namespace tokred
