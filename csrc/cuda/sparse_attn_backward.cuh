// Gradients of attention with a per-key bias. Probabilities are recomputed from lse; one kernel
// owns rows of queries (grad_q), one owns keys (grad_k, grad_v, grad_bias), so that every sum has
// one owner and a fixed order. Both need delta, which a first kernel computes.
#pragma once

#include "block.cuh"
#include "sparse_attn_tile.cuh"

namespace tokred::cuda::attention {

// What an owner of keys sums. Where registers are short, grad_k and grad_v take a launch each.
enum class KeyGrads { all, key, value };

template <class StorageType, int kHeadDim, KeyGrads kGrads = KeyGrads::all>
struct BackwardConfig {
  using T = StorageType;
  static constexpr int kDim = kHeadDim;
  static constexpr bool kWantsKey = kGrads != KeyGrads::value;
  static constexpr bool kWantsValue = kGrads != KeyGrads::key;
  static constexpr AttentionTiles kTiles = backward_tiles(kDim, Operand<T>::kPlanes == 3);
  static constexpr int kThreads = kTiles.threads(), kRows = kTiles.rows();
  static constexpr int kColumns = kTiles.columns, kStages = kTiles.stages;
  using Owned = Tile<T, kRows, kDim>;
  using Streamed = Tile<T, kColumns, kDim>;
  using Products = float[1][kColumns / 8][4];
  using Sums = float[1][kDim / 8][4];
};

// What both kernels know of a query row. lse is +inf for a row that sees nothing or does not exist,
// which makes all its probabilities 0.
struct QueryInfo {
  int64_t mask_offset;
  float lse_log2, delta;
  int last_key;
};

__device__ __forceinline__ QueryInfo query_info(const AttentionBackwardParams& p,
                                                const HeadView& view, int64_t index) {
  const auto row = static_cast<uint32_t>(index);
  if (row >= view.rows) return {0, kInfinity, 0.0f, -1};
  const AttentionParams& f = p.forward;
  const int64_t flat = view.flat_row(f, row);
  const float lse = static_cast<const float*>(f.lse)[flat];
  return {f.mask.data && !masks_keys_only(f) ? view.mask_offset(f.mask, row) : 0,
          lse == -kInfinity ? kInfinity : lse * kLog2E, static_cast<const float*>(p.delta)[flat],
          view.last_key(f, row)};
}

// The probability that the row of `info` gives to a key.
__device__ __forceinline__ float probability(float product, float scale, float bias, int64_t key,
                                             const QueryInfo& info, const AttentionParams& p) {
  float logit = fmaf(product, scale, bias);
  if (p.causal || p.mask.data) {
    bool visible = bias != -kInfinity && key <= info.last_key;
    if (visible && p.mask.data && !masks_keys_only(p)) {
      visible = p.mask.data[info.mask_offset + key * p.mask.stride[3]];
    }
    if (!visible) logit = -kInfinity;
  }
  return exp2_approx(logit - info.lse_log2);
}

// The gradient of a logit; exactly 0 where the key has no part in the row.
__device__ __forceinline__ float grad_logit(float probability, float grad, float delta) {
  return probability == 0.0f ? 0.0f : probability * (grad - delta);
}

template <class Sums>
__device__ __forceinline__ void zero(Sums& sums) {
#pragma unroll
  for (auto& tile : sums[0]) {
#pragma unroll
    for (float& x : tile) x = 0.0f;
  }
}

// Writes a lane's part of rows lane / 4 (half 0) or lane / 4 + 8 (half 1), times `scale`.
template <class T, class Sums>
__device__ __forceinline__ void store_sums(T* row, int dim, const Sums& sums, int half,
                                           float scale) {
#pragma unroll
  for (int j = 0; j < static_cast<int>(sizeof(sums[0]) / sizeof(sums[0][0])); ++j) {
    store_pair(row, 8 * j + lane_id() % 4 * 2, dim, sums[0][j][2 * half] * scale,
               sums[0][j][2 * half + 1] * scale);
  }
}

// Products of this warp's 16 owned rows with the rows of a streamed tile.
template <class C>
__device__ __forceinline__ void multiply_owned(typename C::Products& out,
                                               const typename C::Owned& owned,
                                               const typename C::Streamed& streamed) {
  multiply_by_rows<C::kDim>(out, streamed, [&](int k, int) {
    Left<typename C::T> a;
    load_left(a, owned, warp_id() * 16, 16 * k);
    return a;
  });
}

// delta = out . grad_out - grad_lse, one warp a row of [B, Hq, L].
template <class T>
__global__ void __launch_bounds__(256)
    attention_delta_kernel(const __grid_constant__ AttentionBackwardParams p) {
  const AttentionParams& f = p.forward;
  const int64_t flat = int64_t{blockIdx.x} * 8 + warp_id();
  if (flat >= f.batch * f.heads_q * f.queries) return;
  const int64_t query = flat % f.queries, head = flat / f.queries % f.heads_q;
  const int64_t batch = flat / f.queries / f.heads_q;
  const T* out = static_cast<const T*>(f.out) + batch * f.out_stride_batch +
                 head * f.out_stride_head + query * f.out_stride_token;
  const T* grad = static_cast<const T*>(p.grad_out.data) + batch * p.grad_out.stride_batch +
                  head * p.grad_out.stride_head + query * p.grad_out.stride_token;
  float sum = 0.0f;
  for (int64_t i = lane_id(); i < f.value_dim; i += kWarp) {
    sum = fmaf(to_float(out[i]), to_float(grad[i]), sum);
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) {
    static_cast<float*>(p.delta)[flat] = sum - static_cast<const float*>(p.grad_lse)[flat];
  }
}

template <class C>
struct QueryGradShared {
  typename C::Owned query, grad_out;
  typename C::Streamed key[C::kStages], value[C::kStages];
  float bias[C::kStages][C::kColumns];
  QueryInfo info[C::kRows];
};

// Adds one tile of keys to grad_q.
template <class C>
__device__ __forceinline__ void add_keys(typename C::Sums& grad_q, const QueryGradShared<C>& shared,
                                         const AttentionParams& p, int tile, float scale) {
  const int stage = tile % C::kStages;
  typename C::Products product, grad;
  multiply_owned<C>(product, shared.query, shared.key[stage]);
  multiply_owned<C>(grad, shared.grad_out, shared.value[stage]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const QueryInfo info = shared.info[warp_id() * 16 + half * 8 + lane_id() / 4];
#pragma unroll
    for (int j = 0; j < C::kColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + lane_id() % 4 * 2 + e;
        float& x = product[0][j][2 * half + e];
        x = probability(x, scale, shared.bias[stage][column], int64_t{tile} * C::kColumns + column,
                        info, p);
        x = grad_logit(x, grad[0][j][2 * half + e], info.delta);
      }
    }
  }
  accumulate(grad_q, product, shared.key[stage]);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads)
    attention_grad_query_kernel(const __grid_constant__ AttentionBackwardParams p) {
  using T = typename C::T;
  auto& shared = shared_memory<QueryGradShared<C>>();
  const AttentionParams& f = p.forward;
  const int64_t rows = f.queries * (f.heads_q / f.heads_kv);
  const int64_t row_blocks = (rows + C::kRows - 1) / C::kRows;
  const HeadView view(f, blockIdx.x / row_blocks);
  // The last rows see the most keys under the causal rule, so they start first.
  const int64_t first_row = (row_blocks - 1 - blockIdx.x % row_blocks) * C::kRows;
  const auto last_row = static_cast<uint32_t>(min(first_row + C::kRows, rows) - 1);
  const int64_t end = max(view.last_key(f, last_row) + 1, 0);
  const int tiles = static_cast<int>((end + C::kColumns - 1) / C::kColumns);
  const auto scale = static_cast<float>(f.scale);
  const RowSource<T> keys(f.k, view.batch, view.head, 0, f.head_dim);
  const RowSource<T> values(f.v, view.batch, view.head, 0, f.value_dim);
  const int thread = static_cast<int>(threadIdx.x);

  const auto load = [&](int tile) {
    const int64_t first_key = int64_t{tile} * C::kColumns;
    const int stage = tile % C::kStages;
    load_keys<C::kThreads>(shared.key[stage], keys, f, view, first_key);
    load_keys<C::kThreads>(shared.value[stage], values, f, view, first_key);
    cp_async_commit();
    if (thread < C::kColumns) {
      shared.bias[stage][thread] = view.key_bias_log2(f, first_key + thread);
    }
  };
  const RowSource<T> queries(f.q, view.batch, 0, 0, f.head_dim);
  const RowSource<T> grads(p.grad_out, view.batch, 0, 0, f.value_dim);
  load_queries<C::kThreads>(shared.query, queries, view, first_row);
  load_queries<C::kThreads>(shared.grad_out, grads, view, first_row);
  if (thread < C::kRows) shared.info[thread] = query_info(p, view, first_row + thread);

  typename C::Sums grad_q;
  zero(grad_q);
  if (C::kStages > 1 && tiles > 0) load(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (C::kStages == 1) {
      __syncthreads();
      load(tile);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (C::kStages > 1 && tile + 1 < tiles) load(tile + 1);
    add_keys<C>(grad_q, shared, f, tile, scale * kLog2E);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + warp_id() * 16 + half * 8 + lane_id() / 4;
    if (row >= rows) continue;
    T* out = static_cast<T*>(p.grad_q) +
             view.flat_row(f, static_cast<uint32_t>(row)) * f.head_dim;
    store_sums(out, static_cast<int>(f.head_dim), grad_q, half, scale);
  }
}

template <class C>
struct KeyGradShared {
  typename C::Owned key, value;
  typename C::Streamed query[C::kStages], grad_out[C::kStages];
  QueryInfo info[C::kStages][C::kColumns];
  float bias[C::kRows];
};

template <class C>
struct KeyGradSums {
  typename C::Sums key, value;  // the one that is not wanted takes no registers
  float bias[2];
};

// Adds one tile of query rows: products have a key a row and a query row a column.
template <class C>
__device__ __forceinline__ void add_queries(KeyGradSums<C>& sums, const KeyGradShared<C>& shared,
                                            const AttentionParams& p, int64_t first_key, int stage,
                                            float scale) {
  typename C::Products weight, grad;
  multiply_owned<C>(weight, shared.key, shared.query[stage]);
  if constexpr (C::kWantsKey) multiply_owned<C>(grad, shared.value, shared.grad_out[stage]);
#pragma unroll
  for (int j = 0; j < C::kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const QueryInfo info = shared.info[stage][8 * j + lane_id() % 4 * 2 + e];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_id() * 16 + half * 8 + lane_id() / 4;
        float& x = weight[0][j][2 * half + e];
        x = probability(x, scale, shared.bias[row], first_key + row, info, p);
        if constexpr (C::kWantsKey) {
          float& g = grad[0][j][2 * half + e];
          g = grad_logit(x, g, info.delta);
          sums.bias[half] += g;
        }
      }
    }
  }
  if constexpr (C::kWantsValue) accumulate(sums.value, weight, shared.grad_out[stage]);
  if constexpr (C::kWantsKey) accumulate(sums.key, grad, shared.query[stage]);
}

template <class C>
__device__ __forceinline__ void store_key_grads(const KeyGradSums<C>& sums,
                                                const AttentionBackwardParams& p,
                                                const HeadView& view, int64_t first_key) {
  using T = typename C::T;
  const AttentionParams& f = p.forward;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float bias = warp_sum<4>(sums.bias[half]);
    const int64_t key = first_key + warp_id() * 16 + half * 8 + lane_id() / 4;
    if (key >= f.keys) continue;
    const int64_t flat = (view.batch * f.heads_kv + view.head) * f.keys + key;
    if constexpr (C::kWantsValue) {
      store_sums(static_cast<T*>(p.grad_v) + flat * f.value_dim, static_cast<int>(f.value_dim),
                 sums.value, half, 1.0f);
    }
    if constexpr (C::kWantsKey) {
      store_sums(static_cast<T*>(p.grad_k) + flat * f.head_dim, static_cast<int>(f.head_dim),
                 sums.key, half, static_cast<float>(f.scale));
      if (p.grad_bias && lane_id() % 4 == 0) static_cast<float*>(p.grad_bias)[flat] = bias;
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads)
    attention_grad_key_kernel(const __grid_constant__ AttentionBackwardParams p) {
  using T = typename C::T;
  auto& shared = shared_memory<KeyGradShared<C>>();
  const AttentionParams& f = p.forward;
  const int64_t key_blocks = (f.keys + C::kRows - 1) / C::kRows;
  const HeadView view(f, blockIdx.x / key_blocks);
  const int64_t first_key = blockIdx.x % key_blocks * int64_t{C::kRows};
  // Under the causal rule the first query that sees a key of this block.
  const int64_t first_query = f.causal ? max(first_key - (f.keys - f.queries), int64_t{0}) : 0;
  const int64_t first_tile = first_query * view.group / C::kColumns;
  const int64_t tiles = (int64_t{view.rows} + C::kColumns - 1) / C::kColumns;
  const RowSource<T> queries(f.q, view.batch, 0, 0, f.head_dim);
  const RowSource<T> grads(p.grad_out, view.batch, 0, 0, f.value_dim);
  const int thread = static_cast<int>(threadIdx.x);

  const auto load = [&](int64_t tile) {
    const int stage = static_cast<int>(tile % C::kStages);
    load_queries<C::kThreads>(shared.query[stage], queries, view, tile * C::kColumns);
    load_queries<C::kThreads>(shared.grad_out[stage], grads, view, tile * C::kColumns);
    cp_async_commit();
    if (thread < C::kColumns) {
      shared.info[stage][thread] = query_info(p, view, tile * C::kColumns + thread);
    }
  };
  const RowSource<T> keys(f.k, view.batch, view.head, 0, f.head_dim);
  const RowSource<T> values(f.v, view.batch, view.head, 0, f.value_dim);
  load_keys<C::kThreads>(shared.key, keys, f, view, first_key);
  load_keys<C::kThreads>(shared.value, values, f, view, first_key);
  if (thread < C::kRows) shared.bias[thread] = view.key_bias_log2(f, first_key + thread);

  KeyGradSums<C> sums;
  zero(sums.key);
  zero(sums.value);
  sums.bias[0] = sums.bias[1] = 0.0f;
  if (C::kStages > 1 && first_tile < tiles) load(first_tile);
  for (int64_t tile = first_tile; tile < tiles; ++tile) {
    if (C::kStages == 1) {
      __syncthreads();
      load(tile);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (C::kStages > 1 && tile + 1 < tiles) load(tile + 1);
    add_queries<C>(sums, shared, f, first_key, static_cast<int>(tile % C::kStages),
                   static_cast<float>(f.scale) * kLog2E);
  }
  store_key_grads<C>(sums, p, view, first_key);
}

}  // namespace tokred::cuda::attention
