// attention_rows: a block owns query rows of a key head and streams a chunk of its keys; then a
// softmax a row, in place.
#pragma once

#include "attention/cuda/head_scores.cuh"
#include "score/cuda/attention_tile.cuh"

namespace tokred::cuda::scoring {

// An owned query row: where its mask lies, and the last key it may see.
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
    float* out =
        p.rows +
        ((rows.view.batch * a.heads_q + rows.head(row)) * a.queries + rows.query(row)) * a.keys;
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
  load_tile<C::kThreads>(
      shared.query, queries, static_cast<int>(a.head_dim), is_aligned<T>(a.q), [&](int r) {
        const uint32_t row = first_row + r;
        return row < rows.count
                   ? queries + rows.head(row) * a.q.stride_head + rows.query(row) * a.q.stride_token
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
