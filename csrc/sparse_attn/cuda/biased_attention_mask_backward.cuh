// biased_attention_mask_backward: the gradient of a float mask. A block owns rows or keys of the
// mask and adds up, in order, the heads and batch entries that share them: no atomics.
#pragma once

#include "sparse_attn/cuda/biased_attention_backward_query.cuh"

namespace tokred::cuda::attention {

template <class C>
struct MaskGradShared {
  QueryGradShared<C> tiles;
  alignas(16) float sums[C::kRows / 16][C::kColumns];  // of the rows of each warp
};

// Adds the gradients of a tile to the rows of the mask.
template <class C>
__device__ __forceinline__ void add_to_rows(float* grad, const typename C::Products& grads,
                                            int64_t keys, int64_t rows, int64_t first_key) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_id() * 16 + half * 8 + lane_id() / 4;
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < C::kColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t key = first_key + 8 * j + lane_id() % 4 * 2 + e;
        if (key < keys) grad[row * keys + key] += grads[0][j][2 * half + e];
      }
    }
  }
}

// Adds the gradients of a tile to the one row that all queries share. Rows that do not exist have
// gradients of 0.
template <class C>
__device__ __forceinline__ void add_to_shared_row(float* grad, MaskGradShared<C>& shared,
                                                  const typename C::Products& grads, int64_t keys,
                                                  int64_t first_key) {
#pragma unroll
  for (int j = 0; j < C::kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = grads[0][j][e] + grads[0][j][2 + e];
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (lane_id() < 4) shared.sums[warp_id()][8 * j + lane_id() * 2 + e] = sum;
    }
  }
  __syncthreads();
  for (int column = static_cast<int>(threadIdx.x); column < C::kColumns; column += C::kThreads) {
    float sum = 0.0f;
    for (int warp = 0; warp < C::kRows / 16; ++warp) sum += shared.sums[warp][column];
    if (first_key + column < keys) grad[first_key + column] += sum;
  }
  __syncthreads();
}

// kSharesRow: all queries share the one row of the mask.
template <class C, bool kSharesRow>
__global__ void __launch_bounds__(C::kThreads, 2)
    attention_grad_mask_kernel(const __grid_constant__ AttentionMaskBackwardParams m) {
  using T = typename C::T;
  auto& shared = shared_memory<MaskGradShared<C>>();
  auto& tiles = shared.tiles;
  const AttentionBackwardParams& p = m.backward;
  const AttentionParams& f = p.forward;
  const auto row_tiles = static_cast<uint32_t>((f.queries + C::kRows - 1) / C::kRows);
  const auto key_tiles = static_cast<uint32_t>((f.keys + C::kColumns - 1) / C::kColumns);
  const uint32_t parts = kSharesRow ? (key_tiles + kMaskKeyTiles - 1) / kMaskKeyTiles : row_tiles;
  const uint32_t part = blockIdx.x % parts, mask_head = blockIdx.x / parts % m.heads;
  const int64_t mask_batch = blockIdx.x / parts / m.heads;
  const int thread = static_cast<int>(threadIdx.x);

  const uint32_t first_tile = kSharesRow ? part * kMaskKeyTiles : 0;
  const uint32_t end_tile = kSharesRow ? min(first_tile + kMaskKeyTiles, key_tiles) : key_tiles;
  const int64_t own_row = kSharesRow ? 0 : int64_t{part} * C::kRows;
  float* grad = static_cast<float*>(m.grad_mask) +
                ((mask_batch * m.heads + mask_head) * m.queries + own_row) * f.keys;
  const int64_t first = int64_t{first_tile} * C::kColumns;
  const int64_t end = kSharesRow ? min(int64_t{end_tile} * C::kColumns, f.keys)
                                 : min(int64_t{C::kRows}, f.queries - own_row) * f.keys;
  for (int64_t i = first + thread; i < end; i += C::kThreads) grad[i] = 0.0f;

  const auto add_tiles = [&](const HeadView& view, int64_t kv_head, int64_t first_row) {
    const auto last_row = static_cast<uint32_t>(min(first_row + C::kRows, int64_t{view.rows}) - 1);
    const int64_t seen = max(view.last_key(f, last_row) + 1, 0);
    const uint32_t tile_end =
        min(static_cast<uint32_t>((seen + C::kColumns - 1) / C::kColumns), end_tile);
    if (first_tile >= tile_end) return;
    __syncthreads();  // the rows and keys before these have been read
    const RowSource<T> keys(f.k, view.batch, kv_head, 0, f.head_dim);
    const RowSource<T> values(f.v, view.batch, kv_head, 0, f.value_dim);
    const RowSource<T> queries(f.q, view.batch, 0, 0, f.head_dim);
    const RowSource<T> grads(p.grad_out, view.batch, 0, 0, f.value_dim);
    load_queries<C::kThreads>(tiles.query, queries, view, first_row);
    load_queries<C::kThreads>(tiles.grad_out, grads, view, first_row);
    if (thread < C::kRows) tiles.info[thread] = query_info(p, view, first_row + thread);
    const auto next_tile = [](uint32_t from, bool) { return VisitedTile<true>(from, true, false); };
    const auto load = [&](uint32_t tile, int stage) {
      const int64_t first_key = int64_t{tile} * C::kColumns;
      load_keys<C::kThreads>(tiles.key[stage], keys, f, view, first_key);
      load_keys<C::kThreads>(tiles.value[stage], values, f, view, first_key);
      cp_async_commit();
      if (thread < C::kColumns) {
        tiles.bias[stage][thread] = view.key_bias_log2(f, first_key + thread);
      }
    };
    visit_tiles<C>(tile_end, next_tile(first_tile, true), next_tile, load,
                   [&](VisitedTile<true> tile, int stage) {
                     typename C::Products product;
                     logit_grads<C, false>(product, tiles, f, view, first_row, tile, stage,
                                           logit_scale(f));
                     const int64_t first_key = int64_t{tile.number()} * C::kColumns;
                     if constexpr (kSharesRow) {
                       add_to_shared_row<C>(grad, shared, product, f.keys, first_key);
                     } else {
                       add_to_rows<C>(grad, product, f.keys, view.rows - first_row, first_key);
                     }
                   });
  };
  const bool all_batch = m.batch != f.batch, all_heads = m.heads != f.heads_q;
  const int64_t group = f.heads_q / f.heads_kv;
  for (int64_t batch = all_batch ? 0 : mask_batch; batch < (all_batch ? f.batch : mask_batch + 1);
       ++batch) {
    for (int64_t head = all_heads ? 0 : mask_head; head < (all_heads ? f.heads_q : mask_head + 1);
         ++head) {
      HeadView view(f, batch * f.heads_kv + head / group);
      view.head = head;
      view.group = 1;
      view.rows = static_cast<uint32_t>(f.queries);
      for (uint32_t tile = kSharesRow ? 0 : part; tile < (kSharesRow ? row_tiles : part + 1);
           ++tile) {
        add_tiles(view, head / group, int64_t{tile} * C::kRows);
      }
    }
  }
}

}  // namespace tokred::cuda::attention
