// Recomputes the gradients of attention that are NaN, from the visible pairs alone; see
// attention/cuda/recompute.cuh.
#pragma once

#include "attention/cuda/recompute.cuh"
#include "sparse_attn/params.h"

namespace tokred::cuda::attention {

// One pair: its probability, and the gradients of its logit and of its product.
struct PairGradient {
  float probability, logit, product;
};
template <class T>
__device__ __forceinline__ PairGradient pair_gradient(const AttentionBackwardParams& b,
                                                      int64_t flat, const LaneRow& q,
                                                      const LaneRow& grad_out, const LaneRow& k,
                                                      const LaneRow& v, float bias) {
  const float lse = static_cast<const float*>(b.forward.lse)[flat];
  float product = dot(q, k);
  const float slope = cap_product(product, b.forward);
  const float logit = fmaf(product, logit_scale(b.forward), bias);
  const float probability = lse == -kInfinity ? 0.0f : exp2_approx(logit - lse * kLog2E);
  const float delta = static_cast<const float*>(b.delta)[flat], along = dot(grad_out, v);
  const float grad = probability == 0.0f ? 0.0f : probability * (along - delta);
  return {probability, grad, grad_product(grad, slope)};
}

template <class T>
__global__ void __launch_bounds__(256, 1)
    recompute_grad_query_kernel(const __grid_constant__ AttentionBackwardParams b,
                                const __grid_constant__ KeyLists lists) {
  const AttentionParams& f = b.forward;
  const QueryRow at(f);
  if (!at.exists(f)) return;
  T* grad_q = static_cast<T*>(b.grad_q) + at.flat * f.head_dim;
  if (!has_nan(grad_q, f.head_dim)) return;
  const PlainKeys<T> keys(f, lists, {}, at.batch, at.head, at.query);
  LaneRow q, grad_out, sum = {};
  load_row(q, row_of<T>(f.q, at.batch, at.head, at.query), f.head_dim);
  load_row(grad_out, row_of<T>(b.grad_out, at.batch, at.head, at.query), f.value_dim);
  for (int64_t first = 0; first < keys.length(); first += kWarp) {
    const auto mine = keys.find(first + lane_id());
    each_visible(mine.key >= 0, [&](int lane) {
      const auto found = mine.of(lane);
      LaneRow k, v;
      keys.load_key(k, found, first + lane);
      keys.load_value(v, found);
      const auto grad = pair_gradient<T>(b, at.flat, q, grad_out, k, v, found.bias);
      if (grad.product != 0.0f) add(sum, grad.product, k);
    });
  }
  store_row(grad_q, f.head_dim, sum, static_cast<float>(f.scale));
}

// The gradients of one key of [B, Hkv, N].
template <class T>
__global__ void __launch_bounds__(256, 1)
    recompute_grad_key_kernel(const __grid_constant__ AttentionBackwardParams b,
                              const __grid_constant__ KeyLists lists) {
  const AttentionParams& f = b.forward;
  const int64_t flat = int64_t{blockIdx.x} * 8 + warp_id(), key = flat % f.keys;
  const int64_t kv_head = flat / f.keys % f.heads_kv, batch = flat / f.keys / f.heads_kv;
  if (batch >= f.batch) return;
  T* grad_k = static_cast<T*>(b.grad_k) + flat * f.head_dim;
  T* grad_v = static_cast<T*>(b.grad_v) + flat * f.value_dim;
  float* grad_bias = b.grad_bias ? static_cast<float*>(b.grad_bias) + flat : nullptr;
  const bool bias_nan = grad_bias && *grad_bias != *grad_bias;
  if (!bias_nan && !has_nan(grad_k, f.head_dim) && !has_nan(grad_v, f.value_dim)) return;
  LaneRow k, v, sum_k = {}, sum_v = {};
  float sum_bias = 0.0f;
  load_row(k, row_of<T>(f.k, batch, kv_head, key), f.head_dim);
  load_row(v, row_of<T>(f.v, batch, kv_head, key), f.value_dim);
  const int64_t group = f.heads_q / f.heads_kv;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t first = 0; first < f.queries; first += kWarp) {
      const int64_t mine = first + lane_id();
      // How often this lane's query has the key.
      int times = 0;
      if (mine < f.queries) {
        const PlainKeys<T> keys(f, lists, {}, batch, head, mine);
        if (keys.sees_key(key)) {
          times = lists.indices ? 0 : 1;
          for (int64_t i = 0; lists.indices && i < lists.length; ++i) {
            times += keys.indices[i] == key;
          }
        }
      }
      each_visible(times > 0, [&](int lane) {
        const int64_t query = first + lane;
        const float count = static_cast<float>(__shfl_sync(kAllLanes, times, lane));
        LaneRow q, grad_out;
        load_row(q, row_of<T>(f.q, batch, head, query), f.head_dim);
        load_row(grad_out, row_of<T>(b.grad_out, batch, head, query), f.value_dim);
        const PlainKeys<T> keys(f, lists, {}, batch, head, query);
        const int64_t row = (batch * f.heads_q + head) * f.queries + query;
        const auto grad = pair_gradient<T>(b, row, q, grad_out, k, v, keys.bias_of(key));
        sum_bias = fmaf(count, grad.logit, sum_bias);
        if (grad.probability != 0.0f) add(sum_v, count * grad.probability, grad_out);
        if (grad.product != 0.0f) add(sum_k, count * grad.product, q);
      });
    }
  }
  store_row(grad_k, f.head_dim, sum_k, static_cast<float>(f.scale));
  store_row(grad_v, f.value_dim, sum_v, 1.0f);
  __syncwarp();
  if (grad_bias && lane_id() == 0) *grad_bias = sum_bias;
}

}  // namespace tokred::cuda::attention
