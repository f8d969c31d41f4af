// Which query row sees which key. The kernels look at tiles first, skip those that are hidden from
// all of a warp's rows, and look at single pairs only where a tile is visible in part.
#pragma once

#include <type_traits>

#include "attention/cuda/plan.h"
#include "attention/params.h"
#include "common/cuda/ptx.cuh"
#include "common/cuda/warp.cuh"

namespace tokred::cuda::attention {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// The shape as the plans take it.
inline AttentionShape attention_shape(const AttentionParams& p) {
  return {p.batch,
          p.heads_q,
          p.heads_kv,
          p.queries,
          p.keys,
          p.head_dim,
          p.value_dim,
          p.dtype == DType::f32,
          p.blocks.mask.data && p.blocks.mask.stride[1] != 0};
}

// Whether the mask says the same to every query, so that it is a property of the key.
__host__ __device__ __forceinline__ bool masks_keys_only(const AttentionParams& p) {
  return p.mask.data && p.mask.stride[1] == 0 && p.mask.stride[2] == 0;
}

// One key head, and the query rows that read it: row r is query r / group of head
// head * group + r % group, so that the heads of a group share every key tile. There are
// L * group < 2^32 rows.
struct HeadView {
  int64_t batch, head;
  uint32_t group, rows;
  const bool* key_mask;  // of this head's keys; null where all exist
  const float* key_bias;

  __device__ HeadView(const AttentionParams& p, int64_t index)
      : batch(index / p.heads_kv), head(index % p.heads_kv),
        group(static_cast<uint32_t>(p.heads_q / p.heads_kv)),
        rows(static_cast<uint32_t>(p.queries * group)), key_mask(nullptr), key_bias(nullptr) {
    if (masks_keys_only(p)) key_mask = p.mask.data + batch * p.mask.stride[0];
    if (p.key_bias) {
      key_bias = static_cast<const float*>(p.key_bias) + batch * p.bias_stride_batch +
                 head * p.bias_stride_head;
    }
  }

  __device__ int64_t query(uint32_t row) const { return row / group; }
  __device__ int64_t query_head(uint32_t row) const { return head * group + row % group; }

  // Where a row of a contiguous [B, Hq, L] lies.
  __device__ int64_t flat_row(const AttentionParams& p, uint32_t row) const {
    return (batch * p.heads_q + query_head(row)) * p.queries + query(row);
  }
  // Where a row lies in a mask that differs by query, or in numbers for pairs. 0 without either.
  __device__ int64_t mask_offset(const AttentionParams& p, uint32_t row) const {
    if (masks_keys_only(p)) return 0;
    const int64_t (&stride)[4] = p.pair_bias.data ? p.pair_bias.stride : p.mask.stride;
    return batch * stride[0] + query_head(row) * stride[1] + query(row) * stride[2];
  }
  // The last key that a row sees under the causal rule.
  __device__ int last_key(const AttentionParams& p, uint32_t row) const {
    return static_cast<int>(p.causal ? query(row) + p.keys - p.queries : p.keys - 1);
  }
  __device__ bool key_exists(const AttentionParams& p, int64_t key) const {
    return key < p.keys && (!key_mask || key_mask[key * p.mask.stride[3]]);
  }
  // log2(e) * key_bias, and -inf for a key that does not exist.
  __device__ float key_bias_log2(const AttentionParams& p, int64_t key) const {
    if (!key_exists(p, key)) return -kInfinity;
    return key_bias ? kLog2E * key_bias[key * p.bias_stride_key] : 0.0f;
  }
};

// A tile of the rows that read a key head. Where the block mask differs by query head, so that no
// head should wait for the keys of another, heads have tiles of their own, and the view is that of
// one query head; its keys are still those of the key head.
struct TileRows {
  HeadView view;
  int64_t first;
};
__device__ __forceinline__ bool splits_heads(const AttentionParams& p) {
  return p.blocks.mask.data && p.blocks.mask.stride[1] != 0;
}
template <bool kSparse>
__device__ __forceinline__ int64_t row_tiles(const AttentionParams& p, int tile_rows) {
  const int64_t group = p.heads_q / p.heads_kv;
  if (kSparse && splits_heads(p)) return (p.queries + tile_rows - 1) / tile_rows * group;
  return (p.queries * group + tile_rows - 1) / tile_rows;
}
template <bool kSparse>
__device__ __forceinline__ TileRows rows_of_tile(const AttentionParams& p, const HeadView& keys,
                                                 int64_t tile, int tile_rows) {
  TileRows rows{keys, tile * tile_rows};
  if (kSparse && splits_heads(p)) {
    const uint32_t of_head = static_cast<uint32_t>((p.queries + tile_rows - 1) / tile_rows);
    const auto number = static_cast<uint32_t>(tile);
    rows.view.head = keys.head * keys.group + number / of_head;
    rows.view.group = 1;
    rows.view.rows = static_cast<uint32_t>(p.queries);
    rows.first = int64_t{number % of_head} * tile_rows;
  }
  return rows;
}

// Single pairs -----------------------------------------------------------------------------------

// Pairs of a warp's rows and a tile's columns that are hidden: a bit for each number that a lane
// holds of the fragment (see mma). Found before the products, when registers are free.
template <int kRowTiles, int kColumns>
struct HiddenPairs {
  static constexpr int kOfRow = kColumns / 4, kWords = (2 * kOfRow + 31) / 32;
  static_assert(kOfRow <= 32);
  uint32_t bits[kRowTiles][kWords] = {};

  __device__ __forceinline__ bool at(int i, int half, int j, int e) const {
    return bits[i][half * kOfRow / 32] >> (half * kOfRow % 32 + 2 * j + e) & 1;
  }
  // Adds those that are not visible(row(i, half), column(c)), kAtOnce columns at a time.
  template <int kAtOnce = 1, class Row, class Column, class Visible>
  __device__ __forceinline__ void add(Row row, Column column, Visible visible) {
    decltype(row(0, 0)) rows[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) rows[i][half] = row(i, half);
    }
#pragma unroll kAtOnce
    for (int c = 0; c < kOfRow; ++c) {
      const auto one = column(c / 2 * 8 + lane_id() % 4 * 2 + c % 2);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t bit = 1u << (half * kOfRow % 32 + c);
          if (!visible(rows[i][half], one)) bits[i][half * kOfRow / 32] |= bit;
        }
      }
    }
  }
};

// Whether pairs may be hidden by more than causality and the mask.
__host__ __device__ __forceinline__ bool hides_pairs(const AttentionParams& p) {
  return p.positions.columns > 0 || p.blocks.mask.data;
}

// Whether biased_attention needs the general kernels: the dense ones have no registers left for
// positions, blocks, softcap and pair biases.
__host__ __device__ __forceinline__ bool is_general(const AttentionParams& p) {
  return hides_pairs(p) || p.softcap > 0 || p.pair_bias.data;
}

// Whether rows may see different keys.
__host__ __device__ __forceinline__ bool rows_differ(const AttentionParams& p) {
  return (p.causal && p.queries > 1) || (p.mask.data && !masks_keys_only(p)) || hides_pairs(p) ||
         p.pair_bias.data;
}

// The number of a pair whose row has mask_offset() `row`, times log2(e). A finite number stays
// finite: where a float mask has the lowest float for every key, all keys weigh the same. T is the
// type of q.
template <class T>
__device__ __forceinline__ float pair_bias_log2(const PairBias& bias, int64_t row, int64_t key) {
  const int64_t at = row + key * bias.stride[3];
  float number;
  if (sizeof(T) == 4 || bias.dtype == DType::f32) {
    number = static_cast<const float*>(bias.data)[at];
  } else {
    number = to_float(static_cast<const T*>(bias.data)[at]);
  }
  constexpr float kLowest = -0x1.fffffep127f;
  const float scaled = kLog2E * number;
  return scaled == -kInfinity && number != -kInfinity ? kLowest : scaled;
}
// A logit of a visible pair with its number, where there are numbers.
template <class T>
__device__ __forceinline__ float with_pair_bias(float logit, const PairBias& bias, int64_t row,
                                                int64_t key) {
  if (!bias.data) return logit;
  const float number = pair_bias_log2<T>(bias, row, key);
  return number == -kInfinity ? number : logit + number;
}

// The one or two columns of a position table. Without a second one nothing is hidden by it.
struct Position {
  int32_t first, second;
};
__device__ __forceinline__ bool sees(Position query, Position key) {
  return key.first <= query.first && key.second <= query.second;
}
__device__ __forceinline__ Position query_position(const PositionTables& t, int64_t batch,
                                                   int64_t query) {
  const int32_t* row = t.query + batch * t.query_stride_batch + query * t.query_stride_token;
  return {row[0], t.columns > 1 ? row[1] : 0};
}
__device__ __forceinline__ Position key_position(const PositionTables& t, int64_t batch,
                                                 int64_t key) {
  const int32_t* row = t.key + batch * t.key_stride_batch + key * t.key_stride_token;
  return {row[0], t.columns > 1 ? row[1] : 0};
}

__device__ __forceinline__ uint32_t block_of(int64_t i, int64_t block) {
  constexpr int64_t kMaxInt = 0x7fffffff;
  return static_cast<uint32_t>(i) /
         optimization_barrier(static_cast<uint32_t>(block < kMaxInt ? block : kMaxInt));
}
// The row of the block mask for a query of a head, and the offset in it for a key.
__device__ __forceinline__ const bool* block_row(const AttentionParams& p, int64_t batch,
                                                 int64_t query_head, int64_t query) {
  const MaskView& mask = p.blocks.mask;
  return mask.data + batch * mask.stride[0] + query_head * mask.stride[1] +
         block_of(query, p.blocks.block_q) * mask.stride[2];
}
__device__ __forceinline__ int64_t block_column(const AttentionParams& p, int64_t key) {
  return block_of(key, p.blocks.block_k) * p.blocks.mask.stride[3];
}

// Whole tiles ------------------------------------------------------------------------------------

inline constexpr unsigned kSomeVisible = 1, kSomeHidden = 2;

// kSomeVisible and kSomeHidden as the block mask has them for rows and keys first .. last. Where a
// block is much smaller than a rectangle, every rectangle counts as visible in part.
__device__ __forceinline__ unsigned look_at_blocks(const AttentionParams& p, const HeadView& view,
                                                   int64_t first_row, int64_t last_row,
                                                   int64_t first_key, int64_t last_key) {
  constexpr uint32_t kMany = 64;
  if (first_row >= view.rows || first_key >= p.keys) return 0;
  last_row = min(last_row, int64_t{view.rows} - 1);
  last_key = min(last_key, p.keys - 1);
  const int64_t last_query = view.query(static_cast<uint32_t>(last_row));
  if (p.causal && first_key > last_query + p.keys - p.queries) return 0;
  const int64_t first_query = view.query(static_cast<uint32_t>(first_row));
  const uint32_t rows =
      block_of(last_query, p.blocks.block_q) - block_of(first_query, p.blocks.block_q) + 1;
  const uint32_t columns =
      block_of(last_key, p.blocks.block_k) - block_of(first_key, p.blocks.block_k) + 1;
  if (rows > kMany || columns > kMany || rows * columns > kMany) return kSomeVisible | kSomeHidden;
  const int64_t head = view.query_head(static_cast<uint32_t>(first_row));
  const bool* first = block_row(p, optimization_barrier(view.batch), head, first_query) +
                      block_column(p, first_key);
  unsigned found = 0;
#pragma unroll 1
  for (uint32_t row = 0; row < rows; ++row) {
#pragma unroll 1
    for (uint32_t column = 0; column < columns; ++column) {
      const bool visible = first[row * p.blocks.mask.stride[2] + column * p.blocks.mask.stride[3]];
      found |= visible ? kSomeVisible : kSomeHidden;
    }
  }
  return found;
}

template <bool kSparse>
using TileNumber = std::conditional_t<kSparse, uint32_t, int64_t>;

// The number of a tile that a block visits, whether this warp sees any of it, and whether any of it
// is hidden from the warp. In one register, since kernels keep two of them throughout.
template <bool kSparse>
struct VisitedTile {
  uint32_t bits;

  __device__ VisitedTile(uint32_t number, bool visible, bool hides)
      : bits(number << 2 | (hides ? 2u : 0u) | (visible ? 1u : 0u)) {}
  __device__ uint32_t number() const { return bits >> 2; }
  __device__ bool visible() const { return bits & 1; }
  __device__ bool hides() const { return bits & 2; }
};
template <>
struct VisitedTile<false> {
  TileNumber<false> index;

  __device__ VisitedTile(TileNumber<false> number, bool, bool) : index(number) {}
  __device__ TileNumber<false> number() const { return index; }
  __device__ bool visible() const { return true; }
  __device__ bool hides() const { return false; }
};

// The tiles that some warp of a block has to visit, found by a window of one tile a thread. In
// shared memory: bit w says that warp w sees something, bit 4 + w that something is hidden from it.
template <int kThreads>
struct TileWindow {
  static_assert(kThreads <= 4 * kWarp);
  uint8_t found[kThreads];

  // The first tile from `from` on that is not hidden from all, or `tiles`; all threads call it.
  // look(tile, warp) is what the block mask says, if there is one. `fresh`: no call went before.
  template <bool kSparse, class Look>
  __device__ __forceinline__ VisitedTile<kSparse> next(const AttentionParams& p,
                                                       TileNumber<kSparse> from,
                                                       TileNumber<kSparse> tiles, bool fresh,
                                                       Look look) {
    if constexpr (!kSparse) return {from, true, false};
    if (!p.blocks.mask.data) return {from, true, false};
    for (; from < tiles; ++from, fresh = false) {
      if (fresh || from % kThreads == 0) fill(from - from % kThreads, tiles, look);
      const unsigned tile = found[from % kThreads];
      if (tile & 15) {
        return {from, (tile >> warp_id() & 1) != 0, (tile >> (4 + warp_id()) & 1) != 0};
      }
    }
    return {tiles, false, false};
  }

 private:
  template <class Look>
  __device__ __forceinline__ void fill(uint32_t first, uint32_t tiles, Look look) {
    __syncthreads();
    const uint32_t tile = first + threadIdx.x;
    unsigned all = 0;
#pragma unroll 1
    for (int warp = 0; tile < tiles && warp < kThreads / kWarp; ++warp) {
      const unsigned one = look(tile, warp);
      all |= (one & kSomeVisible ? 1u << warp : 0) | (one & kSomeHidden ? 16u << warp : 0);
    }
    found[threadIdx.x] = static_cast<uint8_t>(all);
    __syncthreads();
  }
};

}  // namespace tokred::cuda::attention
