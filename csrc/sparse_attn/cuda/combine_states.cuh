// combine_states: the softmax over two disjoint sets of keys from its halves, a warp a row.
#pragma once

#include "attention/cuda/plan_decode.h"
#include "common/cuda/warp.cuh"
#include "sparse_attn/params.h"

namespace tokred::cuda::attention {

template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_states_kernel(const __grid_constant__ CombineParams p) {
  const int64_t flat = int64_t{blockIdx.x} * (kCombineThreads / kWarp) + warp_id();
  if (flat >= p.batch * p.heads * p.queries) return;
  const int64_t query = flat % p.queries, head = flat / p.queries % p.heads;
  const int64_t batch = flat / p.queries / p.heads;
  const float lse[2] = {static_cast<const float*>(p.lse_a)[flat],
                        static_cast<const float*>(p.lse_b)[flat]};
  const float top = fmaxf(lse[0], lse[1]);
  float weight[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) weight[i] = top == -kInfinity ? 0.0f : expf(lse[i] - top);
  const float sum = weight[0] + weight[1], inverse = top == -kInfinity ? 0.0f : 1.0f / sum;
  const auto row = [&](const HeadTensor& t) {
    return static_cast<const T*>(t.data) + batch * t.stride_batch + head * t.stride_head +
           query * t.stride_token;
  };
  const T* a = row(p.out_a);
  const T* b = row(p.out_b);
  T* out = static_cast<T*>(p.out) + flat * p.dim;
  for (int64_t i = lane_id(); i < p.dim; i += kWarp) {
    const float x = weight[0] == 0.0f ? 0.0f : weight[0] * to_float(a[i]);
    const float y = weight[1] == 0.0f ? 0.0f : weight[1] * to_float(b[i]);
    out[i] = from_float<T>((x + y) * inverse);
  }
  if (lane_id() == 0) {
    static_cast<float*>(p.lse)[flat] = top == -kInfinity ? top : top + logf(sum);
  }
}

}  // namespace tokred::cuda::attention
