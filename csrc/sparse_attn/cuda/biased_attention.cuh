// biased_attention, forward: one pass over the keys with an online softmax (the
// recurrence of arXiv 2205.14135), in units of log 2. The order of every sum is fixed by N alone.
#pragma once

#include "attention/cuda/forward.cuh"
#include "common/cuda/block.cuh"

namespace tokred::cuda::attention {

// kSparse: with positions, a block mask or a softcap, which dense attention should not have to make
// room for. kSmallTiles: see forward_tiles.
template <class StorageType, int kHeadDim, bool kHidesPairs = false, bool kSmallTiles = false>
struct ForwardConfig {
  using T = StorageType;
  using Key = T;  // the type in which queries and keys are multiplied
  static constexpr int kDim = kHeadDim;
  static constexpr bool kSparse = kHidesPairs;
  static constexpr int kValueDim = forward_value_dim(kDim, Operand<T>::kPlanes == 3);
  static constexpr bool kSmall = kSmallTiles;
  static constexpr AttentionTiles kTiles = forward_tiles(kDim, Operand<T>::kPlanes == 3, kSmall);
  static constexpr int kThreads = kTiles.threads(), kRows = kTiles.rows();
  static constexpr int kRowTiles = kTiles.row_tiles, kKeys = kTiles.columns;
  static constexpr int kStages = kTiles.stages;
  // Where registers are short the query fragments are read again for every key tile.
  static constexpr bool kQueryInRegisters = Operand<T>::kPlanes == 1 && kRowTiles * kDim <= 96;
};

template <class C>
struct ForwardShared {
  Tile<typename C::T, C::kRows, C::kDim> query;
  Tile<typename C::T, C::kKeys, C::kDim> key[C::kStages];
  Tile<typename C::T, C::kKeys, C::kValueDim> value[C::kStages];
  float bias[C::kStages][C::kKeys];
  int64_t mask_offset[C::kRows];  // of a query row; 0 unless the mask differs by query
  int last_key[C::kRows];
  TileWindow<C::kThreads> window;
};

// The rows, keys and values of a block.
template <class C>
struct ForwardBlock : ForwardRows<C> {
  using T = typename C::T;
  using Rows = ForwardRows<C>;
  using Rows::p, Rows::view, Rows::key_head, Rows::first_row, Rows::first_column, Rows::tiles;
  ForwardShared<C>& shared;
  const RowSource<T> keys, values;

  __device__ ForwardBlock(const AttentionParams& p, ForwardShared<C>& shared)
      : Rows(p), shared(shared), keys(p.k, view.batch, key_head, 0, p.head_dim),
        values(p.v, view.batch, key_head, first_column, p.value_dim) {}

  __device__ __forceinline__ void load_rows() {
    load_queries<C::kThreads>(shared.query, RowSource<T>(p.q, view.batch, 0, 0, p.head_dim), view,
                              first_row);
    this->keep_limits(shared, static_cast<int>(threadIdx.x));
  }

  // The tile to visit after, or with, `from`.
  __device__ __forceinline__ VisitedTile<C::kSparse> next_tile(TileNumber<C::kSparse> from,
                                                               bool fresh) {
    return shared.window.template next<C::kSparse>(
        p, from, tiles, fresh,
        [&](uint32_t tile, int warp) { return this->look(tile, warp, 16 * C::kRowTiles); });
  }

  // Starts the copies of a tile of keys. Its biases are read here and stored by store_bias, with
  // work in between that hides the wait.
  __device__ __forceinline__ float load_tile(uint32_t tile, int stage) {
    const int64_t first_key = int64_t{tile} * C::kKeys;
    load_keys<C::kThreads>(shared.key[stage], keys, p, view, first_key);
    load_keys<C::kThreads>(shared.value[stage], values, p, view, first_key);
    cp_async_commit();
    return threadIdx.x < C::kKeys ? view.key_bias_log2(p, first_key + threadIdx.x) : 0.0f;
  }
  __device__ __forceinline__ void store_bias(int stage, float bias) {
    if (threadIdx.x < C::kKeys) shared.bias[stage][threadIdx.x] = bias;
  }
};

// The query fragments of this warp, where registers hold them.
template <class C>
using QueryFragments = Left<typename C::T>[C::kRowTiles][C::kQueryInRegisters ? C::kDim / 16 : 1];

template <class C>
__device__ __forceinline__ Left<typename C::T> query_fragment(const ForwardShared<C>& shared, int i,
                                                              int k) {
  Left<typename C::T> a;
  load_left(a, shared.query, (warp_id() * C::kRowTiles + i) * 16, 16 * k);
  return a;
}
template <class C>
__device__ __forceinline__ void keep_queries(QueryFragments<C>& query,
                                             const ForwardShared<C>& shared) {
  if constexpr (C::kQueryInRegisters) {
#pragma unroll
    for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
      for (int k = 0; k < C::kDim / 16; ++k) query[i][k] = query_fragment<C>(shared, i, k);
    }
  }
}

// The products of this warp's queries with a tile of keys.
template <class C>
__device__ __forceinline__ void multiply_keys(float (&out)[C::kRowTiles][C::kKeys / 8][4],
                                              const ForwardShared<C>& shared, int stage,
                                              const QueryFragments<C>& query) {
  multiply_by_rows<C::kDim>(out, shared.key[stage], [&](int k, int i) {
    if constexpr (C::kQueryInRegisters) {
      return query[i][k];
    } else {
      return query_fragment<C>(shared, i, k);
    }
  });
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    biased_attention_kernel(const __grid_constant__ AttentionParams p) {
  auto& shared = shared_memory<ForwardShared<C>>();
  ForwardBlock<C> block(p, shared);
  const float scale = logit_scale(p);
  // A warp without rows only helps with loading.
  const bool has_rows = block.first_row + warp_id() * C::kRowTiles * 16 < block.view.rows;
  block.load_rows();
  VisitedTile<C::kSparse> tile = block.next_tile(0, true);
  if (C::kStages > 1 && tile.number() < block.tiles) {
    block.store_bias(0, block.load_tile(tile.number(), 0));
  }

  ForwardState<C> state;
  start(state);
  QueryFragments<C> query;
  for (int step = 0; tile.number() < block.tiles; ++step) {
    const int stage = step % C::kStages, next_stage = (step + 1) % C::kStages;
    if (C::kStages == 1) {
      __syncthreads();
      block.store_bias(0, block.load_tile(tile.number(), 0));
    }
    cp_async_wait<0>();
    __syncthreads();
    if (step == 0) keep_queries<C>(query, shared);
    VisitedTile<C::kSparse> next(0, false, false);
    float next_bias = 0.0f;
    if (C::kStages > 1) {
      next = block.next_tile(tile.number() + 1, false);
      if (next.number() < block.tiles) next_bias = block.load_tile(next.number(), next_stage);
    }
    if (has_rows && tile.visible()) {
      HiddenPairs<C::kRowTiles, C::kKeys> hidden;
      if constexpr (C::kSparse) hidden = find_hidden(block, tile);
      float weights[C::kRowTiles][C::kKeys / 8][4];
      multiply_keys<C>(weights, shared, stage, query);
      to_logits<C>(weights, shared, p, hidden, tile.number(), stage, scale,
                   tile.number() >= block.whole_tiles || tile.hides());
      to_weights(weights, state);
      accumulate(state.out, weights, shared.value[stage]);
    }
    if (C::kStages == 1) {
      tile = block.next_tile(tile.number() + 1, false);
    } else {
      if (next.number() < block.tiles) block.store_bias(next_stage, next_bias);
      tile = next;
    }
  }
  if (has_rows) finish(state, p, block.view, block.first_row, block.first_column);
}

}  // namespace tokred::cuda::attention
