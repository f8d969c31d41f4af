// Types that front ends and kernels share, without torch headers.
#pragma once

#include <cstdint>

namespace tokred {

enum class DType : int32_t { f32, f16, bf16, f64 };

// half_cosine is (1 + cosine) / 2: never negative, so that multiplicative weights keep its order.
enum class Metric : int32_t { cosine, dot, l2, half_cosine };

// A row's norm is clamped to this from below, so a zero row has similarity 0 to everything.
inline constexpr float kNormEps = 1e-12f;

// A bool [.., .., .., N] mask read through strides; 0 broadcasts. Null data means "all true".
struct MaskView {
  const bool* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};  // batch, head, query, key; in elements
};

// A [B, N] table of per-token numbers read through strides; 0 broadcasts. Null means "absent".
struct TokenTable {
  const void* data = nullptr;
  int64_t stride_batch = 0, stride_token = 0;
};

// A [B, H, L, D] tensor whose last dimension is contiguous; strides in elements.
struct HeadTensor {
  const void* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_token = 0;
};

// A set of tokens: `count` rows of a [B, N, C] tensor whose channels are contiguous. Row t stands
// at position rows[t], or first + step * t where rows is null.
struct TokenSet {
  const void* data;                         // [B, N, C]
  int64_t stride_batch, stride_token;       // in elements
  int64_t tokens;                           // N; positions outside [0, N) are skipped
  int64_t count;                            // rows in the set
  const int32_t* rows;                      // i32 [B | 1, count] or null
  int64_t rows_stride_batch;                // 0 where shared by the batch
  int64_t first, step;
  const bool* mask;                         // bool [B, N] by position or null; false = skipped
  int64_t mask_stride_batch, mask_stride_token;
  const float* weight;                      // f32 [B, N] by position or null
  int64_t weight_stride_batch, weight_stride_token;
};

// Two sets of tokens to compare: s(i, j) = metric(a_i, b_j).
struct TokenPairs {
  TokenSet a, b;
  int64_t batch, channels;
  DType dtype;
  Metric metric;
};

}  // namespace tokred
