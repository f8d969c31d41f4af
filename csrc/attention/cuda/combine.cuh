// Partial results of attention over disjoint keys, added up: those of the splits of a decode, and
// those that callers bring (combine_states).
#pragma once

#include "attention/cuda/decode.cuh"

namespace tokred::cuda::attention {

inline constexpr int kCombineWarps = kCombineThreads / kWarp;

struct CombineShared {
  float out[kCombineWarps][kMaxHeadDim];
  float sum[kCombineWarps];
};

// One row of one item. Warp w adds up splits w, w + kCombineWarps, ..; then come the warps.
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits_kernel(const __grid_constant__ DecodeParams p) {
  auto& shared = shared_memory<CombineShared>();
  const AttentionParams& a = p.sparse.attention;
  const int64_t local = blockIdx.x / p.item_rows, row = blockIdx.x % p.item_rows;
  const int64_t items = gridDim.x / p.item_rows, slot = local * p.splits * p.item_rows + row;
  const ItemRows item(p, p.first_item + local);
  if (row >= item.rows) return;

  float top = -kInfinity;
  for (int64_t s = lane_id(); s < p.splits; s += kWarp) {
    top = fmaxf(top, p.partial_state(items, slot + s * p.item_rows)[0]);
  }
  top = warp_max(top);
  const float base = top == -kInfinity ? 0.0f : top;

  constexpr int kColumns = kMaxHeadDim / kWarp;
  float out[kColumns] = {}, sum = 0.0f;
#pragma unroll 4
  for (int64_t s = warp_id(); s < p.splits; s += kCombineWarps) {
    const float* state = p.partial_state(items, slot + s * p.item_rows);
    const float* partial = p.partial_out(slot + s * p.item_rows);
    const float weight = exp2_approx(state[0] - base);
    sum = fmaf(weight, state[1], sum);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = j * kWarp + lane_id();
      if (column < a.value_dim) out[j] = fmaf(weight, partial[column], out[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) shared.out[warp_id()][j * kWarp + lane_id()] = out[j];
  if (lane_id() == 0) shared.sum[warp_id()] = sum;
  __syncthreads();

  const int column = static_cast<int>(threadIdx.x);
  if (column >= a.value_dim) return;
  float total = 0.0f, weights = 0.0f;
#pragma unroll
  for (int w = 0; w < kCombineWarps; ++w) {
    total += shared.out[w][column];
    weights += shared.sum[w];
  }
  store_result<T>(a, item.list.view, item.first_row + static_cast<uint32_t>(row), column, top,
                  weights, total);
}

// combine_states: a warp for each row of [B, H, L].
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_states_kernel(const __grid_constant__ CombineParams p) {
  const int64_t flat = int64_t{blockIdx.x} * kCombineWarps + warp_id();
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
