// The forward kernels: the rows of a block, their online softmax (the recurrence of
// arXiv 2205.14135, in units of log 2), logits and results. A configuration C has T, kDim,
// kValueDim, kRows (of a block), kKeys (of a tile), kRowTiles (of 16 rows, of a warp), and kSparse.
#pragma once

#include "attention/cuda/row_source.cuh"

namespace tokred::cuda::attention {

// A lane's part of its warp's rows: of each row tile, rows lane / 4 and lane / 4 + 8.
template <class C>
struct ForwardState {
  float out[C::kRowTiles][C::kValueDim / 8][4];
  float top[C::kRowTiles][2], sum[C::kRowTiles][2];  // largest logit; this lane's part of the sum
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

// Logits to weights exp2(logit - top); times `shrink`, the sums so far are at the new top as well.
template <class C>
__device__ __forceinline__ void to_weights(float (&logit)[C::kRowTiles][C::kKeys / 8][4],
                                           ForwardState<C>& s, float (&shrink)[C::kRowTiles][2]) {
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
      shrink[i][h] = exp2_approx(s.top[i][h] - base);
      s.top[i][h] = top;
      s.sum[i][h] *= shrink[i][h];
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
__device__ __forceinline__ void rescale(ForwardState<C>& s,
                                        const float (&shrink)[C::kRowTiles][2]) {
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < C::kValueDim / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s.out[i][j][e] *= shrink[i][e / 2];
    }
  }
}
template <class C>
__device__ __forceinline__ void to_weights(float (&logit)[C::kRowTiles][C::kKeys / 8][4],
                                           ForwardState<C>& s) {
  float shrink[C::kRowTiles][2];
  to_weights(logit, s, shrink);
  rescale(s, shrink);
}

template <class C>
__device__ __forceinline__ void store_lse(const ForwardState<C>& s, const AttentionParams& p,
                                          const HeadView& view, uint32_t row, int i, int h,
                                          float sum) {
  static_cast<float*>(p.lse)[view.flat_row(p, row)] =
      sum == 0.0f ? -kInfinity : (s.top[i][h] + log2f(sum)) * kLn2;
}
template <class T>
__device__ __forceinline__ T* out_row(const AttentionParams& p, const HeadView& view,
                                      uint32_t row) {
  return static_cast<T*>(p.out) + view.batch * p.out_stride_batch +
         view.query_head(row) * p.out_stride_head + view.query(row) * p.out_stride_token;
}

// Whether a row's part of out, which four lanes hold, has a NaN. Its lse is then set to NaN, by
// which recompute_rows knows the row.
template <class C>
__device__ __forceinline__ bool is_nan(const ForwardState<C>& s, int i, int h) {
  bool nan = false;
#pragma unroll
  for (int j = 0; j < C::kValueDim / 8; ++j) {
#pragma unroll
    for (int e = 2 * h; e < 2 * h + 2; ++e) nan = nan || s.out[i][j][e] != s.out[i][j][e];
  }
  return warp_max<4>(nan ? 1 : 0) > 0;
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
      const bool nan = is_nan(s, i, h);
      const uint32_t row = first_row + lane_row<C>(i, h);
      if (row >= view.rows) continue;
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (lane_id() % 4 == 0 && first_column == 0) {
        store_lse(s, p, view, row, i, h, nan ? kNaN : sum);
      }
      T* out = out_row<T>(p, view, row);
#pragma unroll
      for (int j = 0; j < C::kValueDim / 8; ++j) {
        store_pair(out, first_column + 8 * j + lane_id() % 4 * 2, static_cast<int>(p.value_dim),
                   s.out[i][j][2 * h] * inverse, s.out[i][j][2 * h + 1] * inverse);
      }
    }
  }
}

// A block of rows of one key head, and a part of the value columns.
template <class C>
struct ForwardRows {
  const AttentionParams& p;
  const int64_t key_head;
  const HeadView view;  // of the rows
  const uint32_t first_row;
  const int first_column;
  uint32_t tiles;  // of keys
  uint32_t whole_tiles;  // the first of them, if visible to every row

  // Blocks come in order of rows, then value columns, then heads. The last rows see the most keys
  // under the causal rule, so they start first.
  __device__ explicit ForwardRows(const AttentionParams& p)
      : ForwardRows(p, row_tiles<C::kSparse>(p, C::kRows),
                    (p.value_dim + C::kValueDim - 1) / C::kValueDim) {}

  // The query of a lane's row, or the last one where there is none.
  __device__ int64_t query(int i, int h) const {
    return min(view.query(first_row + lane_row<C>(i, h)), p.queries - 1);
  }

  // look_at_blocks() of a tile and the rows of this block from part * count on, `count` of them.
  __device__ __forceinline__ unsigned look(uint32_t tile, int part, int count) const {
    const int64_t row = int64_t{first_row} + part * count, key = int64_t{tile} * C::kKeys;
    return look_at_blocks(p, view, row, row + count - 1, key, key + C::kKeys - 1);
  }

  // Stores the limits of row number `thread` that to_logits reads; threads beyond the rows do
  // nothing, and there are at least as many threads as rows.
  template <class Shared>
  __device__ __forceinline__ void keep_limits(Shared& shared, int thread) const {
    if (thread >= C::kRows) return;
    const uint32_t row = min(first_row + thread, view.rows - 1);
    shared.last_key[thread] = view.last_key(p, row);
    shared.mask_offset[thread] = view.mask_offset(p, row);
  }

 private:
  __device__ ForwardRows(const AttentionParams& p, int64_t row_blocks, int64_t value_parts)
      : ForwardRows(p, HeadView(p, blockIdx.x / row_blocks / value_parts),
                    row_blocks - 1 - blockIdx.x % row_blocks,
                    static_cast<int>(blockIdx.x / row_blocks % value_parts) * C::kValueDim) {}
  __device__ ForwardRows(const AttentionParams& p, const HeadView& keys, int64_t row_block,
                         int first_column)
      : ForwardRows(p, keys.head, rows_of_tile<C::kSparse>(p, keys, row_block, C::kRows),
                    first_column) {}
  __device__ ForwardRows(const AttentionParams& p, int64_t key_head, const TileRows& rows,
                         int first_column)
      : p(p), key_head(key_head), view(rows.view), first_row(static_cast<uint32_t>(rows.first)),
        first_column(first_column) {
    const uint32_t last_row = min(first_row + C::kRows, view.rows) - 1;
    const int64_t end = max(view.last_key(p, last_row) + 1, 0);
    tiles = static_cast<uint32_t>((end + C::kKeys - 1) / C::kKeys);
    const int whole = max(view.last_key(p, first_row) + 1, 0) / C::kKeys;
    const bool by_pair =
        p.mask.data || (C::kSparse && (p.positions.columns > 0 || p.pair_bias.data));
    whole_tiles = by_pair ? 0 : static_cast<uint32_t>(whole);
  }
};

// The pairs that positions hide, and the block mask where blocks end inside the tile.
template <class C>
__device__ __forceinline__ auto find_hidden(const ForwardRows<C>& rows,
                                            VisitedTile<C::kSparse> tile) {
  const AttentionParams& p = rows.p;
  const int64_t batch = optimization_barrier(rows.view.batch);
  HiddenPairs<C::kRowTiles, C::kKeys> hidden;
  const auto key = [&](int column) {
    return min(int64_t{tile.number()} * C::kKeys + column, p.keys - 1);
  };
  if (p.positions.columns > 0) {
    hidden.add([&](int i, int h) { return query_position(p.positions, batch, rows.query(i, h)); },
               [&](int column) { return key_position(p.positions, batch, key(column)); },
               [](Position query, Position key) { return sees(query, key); });
  }
  if (tile.hides()) {
    const int64_t head = rows.view.query_head(rows.first_row);
    hidden.add([&](int i, int h) { return block_row(p, batch, head, rows.query(i, h)); },
               [&](int column) { return block_column(p, key(column)); },
               [](const bool* row, int64_t column) { return row[column]; });
  }
  return hidden;
}

// Adds the numbers of pairs to a tile of logits, where those of hidden pairs are -inf.
template <class C, class Shared>
__device__ __forceinline__ void add_pair_bias(float (&logit)[C::kRowTiles][C::kKeys / 8][4],
                                              const Shared& shared, const AttentionParams& p,
                                              uint32_t tile) {
  const int64_t first_key = int64_t{tile} * C::kKeys + lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t offset = shared.mask_offset[lane_row<C>(i, h)];
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; ++j) {
        const int64_t key = optimization_barrier(first_key) + 8 * j;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = logit[i][j][2 * h + e];
          if (x != -kInfinity) {
            x = with_pair_bias<typename C::T>(x, p.pair_bias, offset, key + e);
          }
        }
      }
    }
  }
}

// Products to logits, by what `shared` has of the tile and of the rows: bias, last_key and
// mask_offset. Only `per_row_mask` tiles have keys that some row does not see.
template <class C, class Shared>
__device__ __forceinline__ void to_logits(float (&product)[C::kRowTiles][C::kKeys / 8][4],
                                          const Shared& shared, const AttentionParams& p,
                                          const HiddenPairs<C::kRowTiles, C::kKeys>& hidden,
                                          uint32_t tile, int stage, float scale,
                                          bool per_row_mask) {
  const float (&bias)[C::kKeys] = shared.bias[stage];
  const int first_column = lane_id() % 4 * 2;
  if constexpr (C::kSparse) cap_products(product, p);
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
  if (!per_row_mask) return;
  const bool by_query = p.mask.data && !masks_keys_only(p);
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int last_key = shared.last_key[lane_row<C>(i, h)];
      const int64_t offset = shared.mask_offset[lane_row<C>(i, h)];
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * j + first_column + e;
          const int64_t key = int64_t{tile} * C::kKeys + column;
          const bool visible = bias[column] != -kInfinity && key <= last_key &&
                               !hidden.at(i, h, j, e) &&
                               (!by_query || p.mask.data[offset + key * p.mask.stride[3]]);
          if (!visible) product[i][j][2 * h + e] = -kInfinity;
        }
      }
    }
  }
  if constexpr (C::kSparse) {
    if (p.pair_bias.data) add_pair_bias<C>(product, shared, p, tile);
  }
}

}  // namespace tokred::cuda::attention
