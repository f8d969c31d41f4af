// Gradients of attention with a per-key bias. Probabilities are recomputed from lse; one kernel
// owns rows of queries (grad_q: biased_attention_backward_query.cuh), one owns keys (grad_k,
// grad_v, grad_bias), so that every sum has one owner and a fixed order. Both need delta, which a
// first kernel computes.
#pragma once

#include "attention/cuda/row_source.cuh"
#include "common/cuda/block.cuh"
#include "sparse_attn/params.h"

namespace tokred::cuda::attention {

// The sums of an owner of keys. Where registers are short, grad_k and grad_v take a launch each.
enum class KeyGrads { all, key, value };

// kSparse: with positions, a block mask or a softcap, which dense attention should not have to make
// room for.
template <class StorageType, int kHeadDim, KeyGrads kGrads = KeyGrads::all,
          bool kHidesPairs = false>
struct BackwardConfig {
  using T = StorageType;
  static constexpr int kDim = kHeadDim;
  static constexpr bool kSparse = kHidesPairs;
  static constexpr bool kWantsKey = kGrads != KeyGrads::value;
  static constexpr bool kWantsValue = kGrads != KeyGrads::key;
  // Whether the owners of keys know numbers of pairs, and the softcap; else they have no registers.
  static constexpr bool kKeysHavePairs = kSparse && kGrads != KeyGrads::all;
  static constexpr bool kKeysAreCapped = kSparse && (kGrads != KeyGrads::all || kDim <= 64);
  static constexpr AttentionTiles kTiles = backward_tiles(kDim, Operand<T>::kPlanes == 3);
  static constexpr int kThreads = kTiles.threads(), kRows = kTiles.rows();
  static constexpr int kColumns = kTiles.columns, kStages = kTiles.stages;
  using Owned = Tile<T, kRows, kDim>;
  using Streamed = Tile<T, kColumns, kDim>;
  using Products = float[1][kColumns / 8][4];
  using Sums = float[1][kDim / 8][4];
};

// A query row. lse is +inf for a row that sees nothing or does not exist,
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
  return {view.mask_offset(f, row), lse == -kInfinity ? kInfinity : lse * kLog2E,
          static_cast<const float*>(p.delta)[flat], view.last_key(f, row)};
}

// The probability that the row of `info` gives to a key. In sparse attention `hidden` also stands
// for the mask.
template <class C, bool kHasPairs = C::kSparse>
__device__ __forceinline__ float probability(float product, float scale, float bias, int64_t key,
                                             const QueryInfo& info, const AttentionParams& p,
                                             bool hidden) {
  float logit = fmaf(product, scale, bias);
  if (C::kSparse || p.causal || p.mask.data) {
    bool visible = bias != -kInfinity && key <= info.last_key && !hidden;
    if (!C::kSparse && visible && p.mask.data && !masks_keys_only(p)) {
      visible = p.mask.data[info.mask_offset + key * p.mask.stride[3]];
    }
    if (!visible) {
      logit = -kInfinity;
    } else if constexpr (kHasPairs) {
      logit = with_pair_bias<typename C::T>(logit, p.pair_bias, info.mask_offset, key);
    }
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

// Products of this warp's 16 owned rows with the rows of a streamed tile; both have `columns`.
template <class C>
__device__ __forceinline__ void multiply_owned(typename C::Products& out,
                                               const typename C::Owned& owned,
                                               const typename C::Streamed& streamed,
                                               int64_t columns) {
  const auto left = [&](int k, int) {
    Left<typename C::T> a;
    load_left(a, owned, warp_id() * 16, 16 * k);
    return a;
  };
  multiply_by_rows<C::kDim>(out, streamed, left, static_cast<int>(columns));
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

// Streams the tiles from `tile` on: load(tile, stage), and visit(tile, stage) by each warp that has
// to; next(from, fresh) is TileWindow::next.
template <class C, class Next, class Load, class Visit>
__device__ __forceinline__ void visit_tiles(TileNumber<C::kSparse> tiles,
                                            VisitedTile<C::kSparse> tile, Next next, Load load,
                                            Visit visit) {
  if (C::kStages > 1 && tile.number() < tiles) load(tile.number(), 0);
  for (int step = 0; tile.number() < tiles; ++step) {
    const int stage = step % C::kStages;
    if (C::kStages == 1) {
      __syncthreads();
      load(tile.number(), 0);
    }
    cp_async_wait<0>();
    __syncthreads();
    VisitedTile<C::kSparse> following = tile;
    if constexpr (C::kStages > 1) {
      following = next(tile.number() + 1, false);
      if (following.number() < tiles) load(following.number(), (step + 1) % C::kStages);
    }
    if (tile.visible()) visit(tile, stage);
    if constexpr (C::kStages == 1) following = next(tile.number() + 1, false);
    tile = following;
  }
}

template <class C>
struct KeyGradShared {
  typename C::Owned key, value;
  typename C::Streamed query[C::kStages], grad_out[C::kStages];
  QueryInfo info[C::kStages][C::kColumns];
  float bias[C::kRows];
  TileWindow<C::kThreads> window;
};

template <class C>
struct KeyGradSums {
  typename C::Sums key, value;  // the one that is not wanted takes no registers
  float bias[2];
};

// The pairs of keys and query rows that the mask hides, or positions, or the block mask where
// blocks end inside.
template <class C>
__device__ __forceinline__ auto find_hidden_queries(const KeyGradShared<C>& shared,
                                                    const AttentionParams& p, const HeadView& view,
                                                    int64_t first_key, VisitedTile<C::kSparse> tile,
                                                    int stage) {
  HiddenPairs<1, C::kColumns> hidden;
  const auto key = [&](int half) {
    return min(first_key + warp_id() * 16 + half * 8 + lane_id() / 4, p.keys - 1);
  };
  const int64_t batch = optimization_barrier(view.batch);
  const TileRows rows = rows_of_tile<C::kSparse>(p, view, tile.number(), C::kColumns);
  const auto query = [&](int column) {
    return min(rows.view.query(static_cast<uint32_t>(rows.first + column)), p.queries - 1);
  };
  if (p.mask.data && !masks_keys_only(p)) {
    hidden.add([&](int, int half) { return key(half) * p.mask.stride[3]; },
               [&](int column) { return p.mask.data + shared.info[stage][column].mask_offset; },
               [](int64_t column, const bool* row) { return row[column]; });
  }
  if (p.positions.columns > 0) {
    hidden.add([&](int, int half) { return key_position(p.positions, batch, key(half)); },
               [&](int column) { return query_position(p.positions, batch, query(column)); },
               [](Position key, Position query) { return sees(query, key); });
  }
  if (tile.hides()) {
    const int64_t head = rows.view.query_head(static_cast<uint32_t>(rows.first));
    hidden.add([&](int, int half) { return block_column(p, key(half)); },
               [&](int column) { return block_row(p, batch, head, query(column)); },
               [](int64_t column, const bool* row) { return row[column]; });
  }
  return hidden;
}

// Adds one tile of query rows: products have a key a row and a query row a column.
template <class C>
__device__ __forceinline__ void add_queries(KeyGradSums<C>& sums, const KeyGradShared<C>& shared,
                                            const AttentionParams& p, const HeadView& view,
                                            int64_t first_key, VisitedTile<C::kSparse> tile,
                                            int stage, float scale) {
  HiddenPairs<1, C::kColumns> hidden;
  if constexpr (C::kSparse) {
    hidden = find_hidden_queries<C>(shared, p, view, first_key, tile, stage);
  }
  typename C::Products weight, grad;
  multiply_owned<C>(weight, shared.key, shared.query[stage], p.head_dim);
  if constexpr (C::kWantsKey) {
    multiply_owned<C>(grad, shared.value, shared.grad_out[stage], p.value_dim);
  }
#pragma unroll
  for (int j = 0; j < C::kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const QueryInfo info = shared.info[stage][8 * j + lane_id() % 4 * 2 + e];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_id() * 16 + half * 8 + lane_id() / 4;
        float& x = weight[0][j][2 * half + e];
        float slope = 1.0f;
        if constexpr (C::kKeysAreCapped) slope = cap_product(x, p);
        x = probability<C, C::kKeysHavePairs>(x, scale, shared.bias[row], first_key + row, info, p,
                                              hidden.at(0, half, j, e));
        if constexpr (C::kWantsKey) {
          float& g = grad[0][j][2 * half + e];
          g = grad_logit(x, g, info.delta);
          sums.bias[half] += g;
          if constexpr (C::kKeysAreCapped) g = grad_product(g, slope);
        }
      }
    }
  }
  if constexpr (C::kWantsValue) {
    accumulate(sums.value, weight, shared.grad_out[stage], static_cast<int>(p.value_dim));
  }
  if constexpr (C::kWantsKey) {
    accumulate(sums.key, grad, shared.query[stage], static_cast<int>(p.head_dim));
  }
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
__global__ void __launch_bounds__(C::kThreads, C::kSparse ? 2 : 0)
    attention_grad_key_kernel(const __grid_constant__ AttentionBackwardParams p) {
  using T = typename C::T;
  auto& shared = shared_memory<KeyGradShared<C>>();
  const AttentionParams& f = p.forward;
  const int64_t key_blocks = (f.keys + C::kRows - 1) / C::kRows;
  const HeadView view(f, blockIdx.x / key_blocks);
  const int64_t first_key = blockIdx.x % key_blocks * int64_t{C::kRows};
  // Under the causal rule the first query that sees a key of this block.
  const int64_t first_query = f.causal ? max(first_key - (f.keys - f.queries), int64_t{0}) : 0;
  const bool splits = C::kSparse && splits_heads(f);
  const TileNumber<C::kSparse> first_tile = splits ? 0 : first_query * view.group / C::kColumns;
  const TileNumber<C::kSparse> tiles = splits
                                           ? row_tiles<C::kSparse>(f, C::kColumns)
                                           : (int64_t{view.rows} + C::kColumns - 1) / C::kColumns;
  const RowSource<T> queries(f.q, view.batch, 0, 0, f.head_dim);
  const RowSource<T> grads(p.grad_out, view.batch, 0, 0, f.value_dim);
  const int thread = static_cast<int>(threadIdx.x);

  const auto next_tile = [&](TileNumber<C::kSparse> from, bool fresh) {
    return shared.window.template next<C::kSparse>(
        f, from, tiles, fresh, [&](uint32_t tile, int warp) {
          const TileRows rows = rows_of_tile<C::kSparse>(f, view, tile, C::kColumns);
          const int64_t last_row = rows.first + C::kColumns - 1, key = first_key + 16 * warp;
          return look_at_blocks(f, rows.view, rows.first, last_row, key, key + 15);
        });
  };
  const auto load = [&](TileNumber<C::kSparse> tile, int stage) {
    const TileRows rows = rows_of_tile<C::kSparse>(f, view, tile, C::kColumns);
    load_queries<C::kThreads>(shared.query[stage], queries, rows.view, rows.first);
    load_queries<C::kThreads>(shared.grad_out[stage], grads, rows.view, rows.first);
    cp_async_commit();
    if (thread < C::kColumns) {
      shared.info[stage][thread] = query_info(p, rows.view, rows.first + thread);
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
  const VisitedTile<C::kSparse> first = next_tile(first_tile, true);
  visit_tiles<C>(tiles, first, next_tile, load, [&](VisitedTile<C::kSparse> tile, int stage) {
    add_queries<C>(sums, shared, f, view, first_key, tile, stage, logit_scale(f));
  });
  store_key_grads<C>(sums, p, view, first_key);
}

}  // namespace tokred::cuda::attention
