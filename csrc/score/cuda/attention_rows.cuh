// Rows and column statistics of attention matrices, through the tiles of the attention kernels.
#pragma once

#include "attention/cuda/tile.cuh"
#include "score/cuda/moments.cuh"
#include "score/cuda/softmax.cuh"

namespace tokred::cuda::scoring {

using attention::kLog2E;
using attention::Left;
using attention::Operand;

template <class StorageType, int kHeadDim>
struct AttentionConfig {
  using T = StorageType;
  static constexpr int kDim = kHeadDim;
  static constexpr AttentionTiles kTiles = score_tiles(kDim, Operand<T>::kPlanes == 3);
  static constexpr int kThreads = kTiles.threads(), kRows = kTiles.rows();
  static constexpr int kRowTiles = kTiles.row_tiles, kColumns = kTiles.columns;
  static constexpr int kStages = kTiles.stages;
  using Owned = attention::Tile<T, kRows, kDim>;
  using Streamed = attention::Tile<T, kColumns, kDim>;
  using Products = float[kRowTiles][kColumns / 8][4];
};

// Products of this warp's rows with the rows of a streamed tile.
template <class C>
__device__ __forceinline__ void multiply_owned(typename C::Products& out,
                                               const typename C::Owned& owned,
                                               const typename C::Streamed& streamed) {
  attention::multiply_by_rows<C::kDim>(out, streamed, [&](int k, int i) {
    Left<typename C::T> a;
    attention::load_left(a, owned, (warp_id() * C::kRowTiles + i) * 16, 16 * k);
    return a;
  });
}

// The owned row that half `half` of row tile i is.
template <class C>
__device__ __forceinline__ int owned_row(int i, int half) {
  return (warp_id() * C::kRowTiles + i) * 16 + half * 8 + lane_id() / 4;
}
// The streamed row of element e (0 or 1) of column tile j.
__device__ __forceinline__ int streamed_row(int j, int e) { return 8 * j + lane_id() % 4 * 2 + e; }

// One key head: which of its keys exist, and which of them a query sees.
struct KeyView {
  const AttentionParams& a;
  const int64_t batch, head;
  const int64_t group;      // query heads that read it
  const bool by_query;      // the mask differs by query or query head
  const bool* key_mask;     // otherwise; null where all exist
  const float* key_bias;

  __device__ KeyView(const AttentionParams& a, int64_t index)
      : a(a), batch(index / a.heads_kv), head(index % a.heads_kv), group(a.heads_q / a.heads_kv),
        by_query(a.mask.data && (a.mask.stride[1] != 0 || a.mask.stride[2] != 0)),
        key_mask(a.mask.data && !by_query ? a.mask.data + batch * a.mask.stride[0] : nullptr),
        key_bias(a.key_bias ? static_cast<const float*>(a.key_bias) +
                                  batch * a.bias_stride_batch + head * a.bias_stride_head
                            : nullptr) {}

  __device__ __forceinline__ bool exists(int64_t key) const {
    return key < a.keys && (!key_mask || key_mask[key * a.mask.stride[3]]);
  }
  // -inf for a key that does not exist.
  __device__ __forceinline__ float bias(int64_t key) const {
    if (!exists(key)) return -kInfinity;
    return key_bias ? key_bias[key * a.bias_stride_key] : 0.0f;
  }
  // Where the mask of a query lies, if it has one of its own.
  __device__ __forceinline__ int64_t mask_offset(int64_t query_head, int64_t query) const {
    return by_query ? batch * a.mask.stride[0] + query_head * a.mask.stride[1] +
                          query * a.mask.stride[2]
                    : 0;
  }
  __device__ __forceinline__ int last_key(int64_t query) const {
    return static_cast<int>(a.causal ? query + a.keys - a.queries : a.keys - 1);
  }
  // Whether the query with that mask and last key sees a key with that bias.
  __device__ __forceinline__ bool sees(int64_t mask_offset, int last_key, int64_t key,
                                       float bias) const {
    return bias != -kInfinity && key <= last_key &&
           (!by_query || a.mask.data[mask_offset + key * a.mask.stride[3]]);
  }

  template <int kThreads, class T, int kRows, int kDim>
  __device__ __forceinline__ void load_keys(attention::Tile<T, kRows, kDim>& tile,
                                            int64_t first) const {
    const T* base = static_cast<const T*>(a.k.data) + batch * a.k.stride_batch +
                    head * a.k.stride_head;
    attention::load_tile<kThreads>(tile, base, static_cast<int>(a.head_dim),
                                   attention::is_aligned<T>(a.k), [&](int r) {
      return exists(first + r) ? base + (first + r) * a.k.stride_token : nullptr;
    });
  }
};

// step(tile) for tiles first .. last - 1, each once load(tile) is done, which copies the next one
// meanwhile where there are two stages.
template <class C, class Load, class Step>
__device__ __forceinline__ void stream(int64_t first, int64_t last, Load load, Step step) {
  if (C::kStages > 1 && first < last) load(first);
  for (int64_t tile = first; tile < last; ++tile) {
    if (C::kStages == 1) {
      __syncthreads();
      load(tile);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (C::kStages > 1 && tile + 1 < last) load(tile + 1);
    step(tile);
  }
}

// attention_rows ---------------------------------------------------------------------------------

// What is known of an owned query row: where its mask lies, and the last key it may see.
struct RowInfo {
  int64_t mask_offset;
  int last_key;
};

template <class C>
struct RowsShared {
  typename C::Owned query;
  typename C::Streamed key[C::kStages];
  RowInfo info[C::kRows];
  float bias[C::kStages][C::kColumns];  // -inf for a key that does not exist
};

// Row r of a key head is query r / group of its r % group-th query head.
struct QueryRows {
  const KeyView& view;
  const uint32_t group, count;  // L * group < 2^32

  __device__ explicit QueryRows(const KeyView& view)
      : view(view), group(static_cast<uint32_t>(view.group)),
        count(static_cast<uint32_t>(view.a.queries * view.group)) {}

  __device__ __forceinline__ int64_t query(uint32_t row) const { return row / group; }
  __device__ __forceinline__ int64_t head(uint32_t row) const {
    return view.head * group + row % group;
  }
};

// Writes the logits of a tile of keys.
template <class C>
__device__ __forceinline__ void store_logits(const AttentionRowsParams& p,
                                             const RowsShared<C>& shared, const QueryRows& rows,
                                             uint32_t first_row, int64_t tile) {
  const AttentionParams& a = p.attention;
  const int stage = static_cast<int>(tile % C::kStages);
  const auto scale = static_cast<float>(a.scale);
  typename C::Products product;
  multiply_owned<C>(product, shared.query, shared.key[stage]);
#pragma unroll
  for (int i = 0; i < 2 * C::kRowTiles; ++i) {
    const int owned = owned_row<C>(i / 2, i % 2);
    const uint32_t row = first_row + owned;
    if (row >= rows.count) continue;
    const RowInfo info = shared.info[owned];
    float* out = p.rows + ((rows.view.batch * a.heads_q + rows.head(row)) * a.queries +
                           rows.query(row)) * a.keys;
#pragma unroll
    for (int j = 0; j < C::kColumns / 4; ++j) {
      const int column = streamed_row(j / 2, j % 2);
      const int64_t key = tile * C::kColumns + column;
      if (key >= a.keys) continue;
      const float bias = shared.bias[stage][column];
      const float logit = fmaf(product[i / 2][j / 2][2 * (i % 2) + j % 2], scale, bias);
      out[key] = rows.view.sees(info.mask_offset, info.last_key, key, bias) ? logit : -kInfinity;
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_rows_kernel(const __grid_constant__ AttentionRowsParams p) {
  using T = typename C::T;
  auto& shared = shared_memory<RowsShared<C>>();
  const AttentionParams& a = p.attention;
  const int64_t chunks = (a.keys + kRowTileKeys - 1) / kRowTileKeys;
  const int64_t row_blocks = (a.queries * (a.heads_q / a.heads_kv) + C::kRows - 1) / C::kRows;
  const KeyView view(a, blockIdx.x / chunks / row_blocks);
  const QueryRows rows(view);
  const auto first_row = static_cast<uint32_t>(blockIdx.x / chunks % row_blocks * C::kRows);
  const int64_t first_key = blockIdx.x % chunks * kRowTileKeys;
  const int64_t end = min(first_key + kRowTileKeys, a.keys);
  const int thread = static_cast<int>(threadIdx.x);

  const auto load = [&](int64_t tile) {
    const int stage = static_cast<int>(tile % C::kStages);
    view.load_keys<C::kThreads>(shared.key[stage], tile * C::kColumns);
    cp_async_commit();
    if (thread < C::kColumns) shared.bias[stage][thread] = view.bias(tile * C::kColumns + thread);
  };
  const T* queries = static_cast<const T*>(a.q.data) + view.batch * a.q.stride_batch;
  attention::load_tile<C::kThreads>(shared.query, queries, static_cast<int>(a.head_dim),
                                    attention::is_aligned<T>(a.q), [&](int r) {
    const uint32_t row = first_row + r;
    return row < rows.count ? queries + rows.head(row) * a.q.stride_head +
                                  rows.query(row) * a.q.stride_token
                            : nullptr;
  });
  for (int r = thread; r < C::kRows; r += C::kThreads) {
    const uint32_t row = min(first_row + r, rows.count - 1);
    shared.info[r] = {view.mask_offset(rows.head(row), rows.query(row)),
                      view.last_key(rows.query(row))};
  }
  // A warp without rows only helps with loading.
  const bool has_rows = first_row + warp_id() * C::kRowTiles * 16 < rows.count;
  stream<C>(first_key / C::kColumns, (end + C::kColumns - 1) / C::kColumns, load,
            [&](int64_t tile) {
    if (has_rows) store_logits<C>(p, shared, rows, first_row, tile);
  });
}

// Logits [B, Hq, L, N] to quotients, a block a row.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    softmax_in_place_kernel(const __grid_constant__ AttentionRowsParams p) {
  auto& scratch = shared_memory<BlockScratch<float>>();
  const AttentionParams& a = p.attention;
  const int64_t rows = a.batch * a.heads_q * a.queries;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    float* row = p.rows + i * a.keys;
    const SoftmaxRow result = softmax_row<kThreads>(row, p.first, p.last, scratch);
    for (int64_t at = threadIdx.x; at < a.keys; at += 4 * kThreads) {
      float x[4];
      load_four<kThreads>(x, row, at, a.keys);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (at + j * kThreads < a.keys) row[at + j * kThreads] = result.weight(x[j]);
      }
    }
  }
}

}  // namespace tokred::cuda::scoring
