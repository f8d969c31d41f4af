// The torch-free vocabulary that front ends and kernels share.
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

}  // namespace tokred
