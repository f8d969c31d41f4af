// Attention with a per-key bias, forward: one pass over the keys with a running softmax (the
// recurrence of arXiv 2205.14135), in units of log 2. The order of every sum is fixed by N alone.
#pragma once

#include "block.cuh"
#include "sparse_attn_tile.cuh"

namespace tokred::cuda::attention {

// kSparse: with positions or a block mask, which dense attention should not have to make room for.
template <class StorageType, int kHeadDim, bool kHidesPairs = false>
struct ForwardConfig {
  using T = StorageType;
  static constexpr int kDim = kHeadDim;
  static constexpr bool kSparse = kHidesPairs;
  static constexpr int kValueDim = forward_value_dim(kDim, Operand<T>::kPlanes == 3);
  static constexpr AttentionTiles kTiles = forward_tiles(kDim, Operand<T>::kPlanes == 3);
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

// What a lane holds of its warp's rows: of each row tile, rows lane / 4 and lane / 4 + 8.
template <class C>
struct ForwardState {
  float out[C::kRowTiles][C::kValueDim / 8][4];
  float top[C::kRowTiles][2], sum[C::kRowTiles][2];  // greatest logit; this lane's part of the sum
};

// The row of the block that half h of row tile i is.
template <class C>
__device__ __forceinline__ int lane_row(int i, int h) {
  return (warp_id() * C::kRowTiles + i) * 16 + h * 8 + lane_id() / 4;
}

template <class C>
__device__ __forceinline__ void start(ForwardState<C>& s) {
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < C::kValueDim / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s.out[i][j][e] = 0.0f;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      s.top[i][h] = -kInfinity;
      s.sum[i][h] = 0.0f;
    }
  }
}

// Logits to weights exp2(logit - top); what was summed so far is brought to the new top.
template <class C>
__device__ __forceinline__ void to_weights(float (&logit)[C::kRowTiles][C::kKeys / 8][4],
                                           ForwardState<C>& s) {
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s.top[i][h];
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; ++j) {
        top = fmaxf(top, fmaxf(logit[i][j][2 * h], logit[i][j][2 * h + 1]));
      }
      top = warp_max<4>(top);
      // A row that has seen nothing yet keeps weights of 0: -inf minus 0 instead of minus -inf.
      const float base = top == -kInfinity ? 0.0f : top;
      const float shrink = exp2_approx(s.top[i][h] - base);
      s.top[i][h] = top;
      s.sum[i][h] *= shrink;
#pragma unroll
      for (int j = 0; j < C::kValueDim / 8; ++j) {
        s.out[i][j][2 * h] *= shrink;
        s.out[i][j][2 * h + 1] *= shrink;
      }
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          logit[i][j][e] = exp2_approx(logit[i][j][e] - base);
          s.sum[i][h] += logit[i][j][e];
        }
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void finish(const ForwardState<C>& s, const AttentionParams& p,
                                       const HeadView& view, uint32_t first_row, int first_column) {
  using T = typename C::T;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = warp_sum<4>(s.sum[i][h]);
      const uint32_t row = first_row + lane_row<C>(i, h);
      if (row >= view.rows) continue;
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (lane_id() % 4 == 0 && first_column == 0) {
        static_cast<float*>(p.lse)[view.flat_row(p, row)] =
            sum == 0.0f ? -kInfinity : (s.top[i][h] + log2f(sum)) * kLn2;
      }
      T* out = static_cast<T*>(p.out) + view.batch * p.out_stride_batch +
               view.query_head(row) * p.out_stride_head + view.query(row) * p.out_stride_token;
#pragma unroll
      for (int j = 0; j < C::kValueDim / 8; ++j) {
        store_pair(out, first_column + 8 * j + lane_id() % 4 * 2, static_cast<int>(p.value_dim),
                   s.out[i][j][2 * h] * inverse, s.out[i][j][2 * h + 1] * inverse);
      }
    }
  }
}

// What a block works on: a block of rows of one key head, and a part of the value columns.
template <class C>
struct ForwardBlock {
  using T = typename C::T;
  const AttentionParams& p;
  ForwardShared<C>& shared;
  const int64_t row_blocks, value_parts;
  const HeadView key_view;
  const TileRows mine;
  const HeadView& view;  // of the rows
  const uint32_t first_row;
  const int first_column;
  uint32_t tiles;   // of keys
  uint32_t whole_tiles;  // the first of them, if visible to every row
  const RowSource<T> keys, values;

  // Blocks come in order of rows, then value columns, then heads. The last rows see the most keys
  // under the causal rule, so they start first.
  __device__ ForwardBlock(const AttentionParams& p, ForwardShared<C>& shared)
      : p(p), shared(shared), row_blocks(row_tiles<C::kSparse>(p, C::kRows)),
        value_parts((p.value_dim + C::kValueDim - 1) / C::kValueDim),
        key_view(p, blockIdx.x / row_blocks / value_parts),
        mine(rows_of_tile<C::kSparse>(p, key_view, row_blocks - 1 - blockIdx.x % row_blocks,
                                      C::kRows)),
        view(mine.view), first_row(static_cast<uint32_t>(mine.first)),
        first_column(static_cast<int>(blockIdx.x / row_blocks % value_parts) * C::kValueDim),
        keys(p.k, view.batch, key_view.head, 0, p.head_dim),
        values(p.v, view.batch, key_view.head, first_column, p.value_dim) {
    const uint32_t last_row = min(first_row + C::kRows, view.rows) - 1;
    const int64_t end = max(view.last_key(p, last_row) + 1, 0);
    tiles = static_cast<uint32_t>((end + C::kKeys - 1) / C::kKeys);
    const int whole = max(view.last_key(p, first_row) + 1, 0) / C::kKeys;
    const bool by_pair = p.mask.data || (C::kSparse && p.positions.columns > 0);
    whole_tiles = by_pair ? 0 : static_cast<uint32_t>(whole);
  }

  __device__ __forceinline__ void load_rows() {
    load_queries<C::kThreads>(shared.query, RowSource<T>(p.q, view.batch, 0, 0, p.head_dim), view,
                              first_row);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= C::kRows) return;
    const uint32_t row = min(first_row + thread, view.rows - 1);
    shared.last_key[thread] = view.last_key(p, row);
    shared.mask_offset[thread] =
        p.mask.data && !masks_keys_only(p) ? view.mask_offset(p.mask, row) : 0;
  }

  // The query of a lane's row, or the last one where there is none.
  __device__ int64_t query(int i, int h) const {
    return min(view.query(first_row + lane_row<C>(i, h)), p.queries - 1);
  }

  // The tile to visit after, or with, `from`.
  __device__ __forceinline__ VisitedTile<C::kSparse> next_tile(TileNumber<C::kSparse> from,
                                                               bool fresh) {
    constexpr int kWarpRows = 16 * C::kRowTiles;
    return shared.window.template next<C::kSparse>(p, from, tiles, fresh, [&](uint32_t tile,
                                                                              int warp) {
      const int64_t row = int64_t{first_row} + warp * kWarpRows;
      const int64_t key = int64_t{tile} * C::kKeys;
      return look_at_blocks(p, view, row, row + kWarpRows - 1, key, key + C::kKeys - 1);
    });
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

// The pairs that positions hide, and the block mask where blocks end inside the tile.
template <class C>
__device__ __forceinline__ auto find_hidden(const ForwardBlock<C>& block,
                                            VisitedTile<C::kSparse> tile) {
  const AttentionParams& p = block.p;
  const int64_t batch = opaque(block.view.batch);
  HiddenPairs<C::kRowTiles, C::kKeys> hidden;
  const auto key = [&](int column) {
    return min(int64_t{tile.number()} * C::kKeys + column, p.keys - 1);
  };
  if (p.positions.columns > 0) {
    hidden.add([&](int i, int h) { return query_position(p.positions, batch, block.query(i, h)); },
               [&](int column) { return key_position(p.positions, batch, key(column)); },
               [](Position query, Position key) { return sees(query, key); });
  }
  if (tile.hides()) {
    const int64_t head = block.view.query_head(block.first_row);
    hidden.add([&](int i, int h) { return block_row(p, batch, head, block.query(i, h)); },
               [&](int column) { return block_column(p, key(column)); },
               [](const bool* row, int64_t column) { return row[column]; });
  }
  return hidden;
}

// Products to logits. Only `careful` tiles have keys that some row does not see.
template <class C>
__device__ __forceinline__ void to_logits(float (&product)[C::kRowTiles][C::kKeys / 8][4],
                                          const ForwardShared<C>& shared, const AttentionParams& p,
                                          const HiddenPairs<C::kRowTiles, C::kKeys>& hidden,
                                          uint32_t tile, int stage, float scale, bool careful) {
  const float(&bias)[C::kKeys] = shared.bias[stage];
  const int first_column = lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < C::kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        product[i][j][e] = fmaf(product[i][j][e], scale, bias[8 * j + first_column + e % 2]);
      }
    }
  }
  if (!careful) return;
  const bool by_query = p.mask.data && !masks_keys_only(p);
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int last_key = shared.last_key[lane_row<C>(i, h)];
      const bool* mask = p.mask.data + shared.mask_offset[lane_row<C>(i, h)];
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * j + first_column + e;
          const int64_t key = int64_t{tile} * C::kKeys + column;
          const bool visible = bias[column] != -kInfinity && key <= last_key &&
                               !hidden.at(i, h, j, e) &&
                               (!by_query || mask[key * p.mask.stride[3]]);
          if (!visible) product[i][j][2 * h + e] = -kInfinity;
        }
      }
    }
  }
}

// The query fragments of this warp, where registers hold them.
template <class C>
using QueryFragments =
    Left<typename C::T>[C::kRowTiles][C::kQueryInRegisters ? C::kDim / 16 : 1];

template <class C>
__device__ __forceinline__ Left<typename C::T> query_fragment(const ForwardShared<C>& shared,
                                                              int i, int k) {
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
  const auto scale = static_cast<float>(p.scale) * kLog2E;
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
