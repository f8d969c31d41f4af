// Gradients of attention, the half that owns rows of queries: grad_q, and the gradients of logits.
#pragma once

#include "sparse_attn/cuda/biased_attention_backward.cuh"

namespace tokred::cuda::attention {

template <class C>
struct QueryGradShared {
  typename C::Owned query, grad_out;
  typename C::Streamed key[C::kStages], value[C::kStages];
  float bias[C::kStages][C::kColumns];
  QueryInfo info[C::kRows];
  TileWindow<C::kThreads> window;
};

// The pairs that the mask hides, or positions, or the block mask where blocks end inside the tile.
template <class C>
__device__ __forceinline__ auto find_hidden_keys(const QueryGradShared<C>& shared,
                                                 const AttentionParams& p, const HeadView& view,
                                                 int64_t first_row, VisitedTile<C::kSparse> tile) {
  HiddenPairs<1, C::kColumns> hidden;
  const int64_t batch = optimization_barrier(view.batch);
  const auto query = [&](int half) {
    const int64_t row = first_row + warp_id() * 16 + half * 8 + lane_id() / 4;
    return min(view.query(static_cast<uint32_t>(row)), p.queries - 1);
  };
  const auto key = [&](int column) {
    return min(int64_t{tile.number()} * C::kColumns + column, p.keys - 1);
  };
  if (p.mask.data && !masks_keys_only(p)) {
    hidden.add(
        [&](int, int half) {
          const int row = warp_id() * 16 + half * 8 + lane_id() / 4;
          return p.mask.data + shared.info[row].mask_offset;
        },
        [&](int column) { return key(column) * p.mask.stride[3]; },
        [](const bool* row, int64_t column) { return row[column]; });
  }
  if (p.positions.columns > 0) {
    hidden.add([&](int, int half) { return query_position(p.positions, batch, query(half)); },
               [&](int column) { return key_position(p.positions, batch, key(column)); },
               [](Position query, Position key) { return sees(query, key); });
  }
  if (tile.hides()) {
    const int64_t head = view.query_head(static_cast<uint32_t>(first_row));
    hidden.add([&](int, int half) { return block_row(p, batch, head, query(half)); },
               [&](int column) { return block_column(p, key(column)); },
               [](const bool* row, int64_t column) { return row[column]; });
  }
  return hidden;
}

// The gradients of the logits of a tile of keys, or of their products before a softcap.
template <class C, bool kOfProducts>
__device__ __forceinline__ void logit_grads(typename C::Products& product,
                                            const QueryGradShared<C>& shared,
                                            const AttentionParams& p, const HeadView& view,
                                            int64_t first_row, VisitedTile<C::kSparse> tile,
                                            int stage, float scale) {
  HiddenPairs<1, C::kColumns> hidden;
  if constexpr (C::kSparse) hidden = find_hidden_keys<C>(shared, p, view, first_row, tile);
  typename C::Products grad;
  multiply_owned<C>(product, shared.query, shared.key[stage], p.head_dim);
  multiply_owned<C>(grad, shared.grad_out, shared.value[stage], p.value_dim);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const QueryInfo info = shared.info[warp_id() * 16 + half * 8 + lane_id() / 4];
#pragma unroll
    for (int j = 0; j < C::kColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + lane_id() % 4 * 2 + e;
        const int64_t key = int64_t{tile.number()} * C::kColumns + column;
        float& x = product[0][j][2 * half + e];
        float slope = 1.0f;
        if constexpr (C::kSparse) slope = cap_product(x, p);
        x = probability<C>(x, scale, shared.bias[stage][column], key, info, p,
                           hidden.at(0, half, j, e));
        x = grad_logit(x, grad[0][j][2 * half + e], info.delta);
        if constexpr (C::kSparse && kOfProducts) x = grad_product(x, slope);
      }
    }
  }
}

// Adds one tile of keys to grad_q.
template <class C>
__device__ __forceinline__ void add_keys(typename C::Sums& grad_q, const QueryGradShared<C>& shared,
                                         const AttentionParams& p, const HeadView& view,
                                         int64_t first_row, VisitedTile<C::kSparse> tile, int stage,
                                         float scale) {
  typename C::Products product;
  logit_grads<C, true>(product, shared, p, view, first_row, tile, stage, scale);
  accumulate(grad_q, product, shared.key[stage], static_cast<int>(p.head_dim));
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kSparse ? 2 : 0)
    attention_grad_query_kernel(const __grid_constant__ AttentionBackwardParams p) {
  using T = typename C::T;
  auto& shared = shared_memory<QueryGradShared<C>>();
  const AttentionParams& f = p.forward;
  const int64_t row_blocks = row_tiles<C::kSparse>(f, C::kRows);
  const HeadView key_view(f, blockIdx.x / row_blocks);
  // The last rows see the most keys under the causal rule, so they start first.
  const TileRows mine =
      rows_of_tile<C::kSparse>(f, key_view, row_blocks - 1 - blockIdx.x % row_blocks, C::kRows);
  const HeadView& view = mine.view;
  const int64_t first_row = mine.first;
  const auto last_row = static_cast<uint32_t>(min(first_row + C::kRows, int64_t{view.rows}) - 1);
  const int64_t end = max(view.last_key(f, last_row) + 1, 0);
  const auto tiles = static_cast<uint32_t>((end + C::kColumns - 1) / C::kColumns);
  const auto scale = static_cast<float>(f.scale);
  const RowSource<T> keys(f.k, view.batch, key_view.head, 0, f.head_dim);
  const RowSource<T> values(f.v, view.batch, key_view.head, 0, f.value_dim);
  const int thread = static_cast<int>(threadIdx.x);

  const auto next_tile = [&](TileNumber<C::kSparse> from, bool fresh) {
    return shared.window.template next<C::kSparse>(
        f, from, tiles, fresh, [&](uint32_t tile, int warp) {
          const int64_t row = first_row + 16 * warp;
          const int64_t key = int64_t{tile} * C::kColumns;
          return look_at_blocks(f, view, row, row + 15, key, key + C::kColumns - 1);
        });
  };
  const auto load = [&](uint32_t tile, int stage) {
    const int64_t first_key = int64_t{tile} * C::kColumns;
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
  visit_tiles<C>(tiles, next_tile(0, true), next_tile, load,
                 [&](VisitedTile<C::kSparse> tile, int stage) {
                   add_keys<C>(grad_q, shared, f, view, first_row, tile, stage, logit_scale(f));
                 });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + warp_id() * 16 + half * 8 + lane_id() / 4;
    if (row >= view.rows) continue;
    T* out = static_cast<T*>(p.grad_q) + view.flat_row(f, static_cast<uint32_t>(row)) * f.head_dim;
    store_sums(out, static_cast<int>(f.head_dim), grad_q, half, scale);
  }
}

}  // namespace tokred::cuda::attention
