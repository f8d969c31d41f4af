// Attention: tiles of keys, values and queries loaded from the rows of a head.
#pragma once

#include "attention/cuda/softcap.cuh"
#include "common/cuda/mma_tile.cuh"
#include "common/cuda/row_io.cuh"

namespace tokred::cuda::attention {

// The rows of a head of k or v, or of a batch item of q or grad_out (head 0), from a column on.
template <class T>
struct RowSource {
  const HeadTensor& tensor;
  const T* first;
  int columns;
  bool aligned;

  __device__ RowSource(const HeadTensor& t, int64_t batch, int64_t head, int64_t column,
                       int64_t columns)
      : tensor(t), first(static_cast<const T*>(t.data) + batch * t.stride_batch +
                         head * t.stride_head + column),
        columns(static_cast<int>(columns - column)), aligned(is_aligned<T>(t)) {}
};

template <int kThreads, class T, int kRows, int kDim>
__device__ __forceinline__ void load_keys(Tile<T, kRows, kDim>& tile, const RowSource<T>& source,
                                          const AttentionParams& p, const HeadView& view,
                                          int64_t first_key) {
  load_tile<kThreads>(tile, source.first, source.columns, source.aligned, [&](int r) {
    const int64_t key = first_key + r;
    return view.key_exists(p, key) ? source.first + key * source.tensor.stride_token : nullptr;
  });
}

template <int kThreads, class TileType, class T, int kRows, int kDim>
__device__ __forceinline__ void load_queries(Tile<TileType, kRows, kDim>& tile,
                                             const RowSource<T>& source, const HeadView& view,
                                             int64_t first_row,
                                             int thread = static_cast<int>(threadIdx.x)) {
  const auto row_at = [&](int r) -> const T* {
    const auto row = static_cast<uint32_t>(first_row + r);
    if (row >= view.rows) return nullptr;
    return source.first + view.query_head(row) * source.tensor.stride_head +
           view.query(row) * source.tensor.stride_token;
  };
  load_tile<kThreads>(tile, source.first, source.columns, source.aligned, row_at, thread);
}

}  // namespace tokred::cuda::attention
