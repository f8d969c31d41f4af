// packed_qk_score: qk_score whose keys are unpacked on their way.
#pragma once

#include "attention/cuda/qk_score.cuh"
#include "common/cuda/ptx.cuh"
#include "packed_attn/cuda/side.cuh"

namespace tokred::cuda::scoring {

struct PackedScoreArgs {
  QkScoreArgs score;  // p.k is the window
  PackedSide k;
  SlotTable slots;
};

// Four keys of a batch item, and where they lie.
struct PackedKeyTile : KeyTile {
  int place[kScoreRows];
};

template <class T, int kLanes, int kRows>
struct PackedScorer : QkScorer<T, kLanes, kRows> {
  using Base = QkScorer<T, kLanes, kRows>;
  using Base::batch, Base::lane, Base::p;
  const PackedScoreArgs& packed;
  const attention::SidePlaces places;
  const int tokens;
  const uint2 codes;  // CodeReader::positions() of this lane

  __device__ PackedScorer(const PackedScoreArgs& a, int64_t batch, int64_t group)
      : PackedScorer(a, batch, group,
                     attention::item_tokens(a.score.p.lengths, a.score.p.lengths_stride, batch,
                                            a.score.p.keys)) {}
  __device__ PackedScorer(const PackedScoreArgs& a, int64_t batch, int64_t group, int64_t tokens)
      : Base(a.score, batch, group), packed(a), places(a.k, a.slots, this->batch, tokens),
        tokens(static_cast<int>(tokens)),
        codes(packing::CodeReader(a.k.packed.format,
                                  8 * lane < a.k.packed.format.head_dim ? 8 * lane : 0)
                  .positions()) {}

  __device__ __forceinline__ PackedKeyTile tile(int64_t first_key) const {
    PackedKeyTile keys;
    keys.visible = 0;
#pragma unroll
    for (int i = 0; i < kScoreRows; ++i) {
      const int64_t key = first_key + i;
      const bool exists =
          key < tokens &&
          (!p.mask || p.mask[batch * p.mask_stride_batch + key * p.mask_stride_token]);
      keys.place[i] = exists ? places.place(static_cast<int>(key)) : attention::kNowhere;
      keys.visible |= keys.place[i] == attention::kNowhere ? 0u : 1u << i;
    }
    return keys;
  }

  __device__ __forceinline__ void load_keys(float (&k)[kScoreRows][8], const PackedKeyTile& keys,
                                            int64_t head) const {
    attention::SideRows<T> rows(packed.k, p.k, packed.slots.data != nullptr,
                                optimization_barrier(batch), head, 8 * lane,
                                {packed.k.packed.format, codes});
#pragma unroll
    for (int i = 0; i < kScoreRows; ++i) rows.numbers(k[i], keys.place[i]);
  }
};

template <class T, int kLanes, int kRows>
__global__ void __launch_bounds__(kScoreThreads, 2)
    packed_score_kernel(const __grid_constant__ PackedScoreArgs a) {
  const ScoreChunk chunk(a.score);
  score_chunk<false, kLanes, kRows>(
      a.score, PackedScorer<T, kLanes, kRows>(a, chunk.batch, chunk.group), chunk);
}

// Rows of `dim` rotated as the keys are, in place; kLanes lanes a row.
template <int kLanes>
__global__ void __launch_bounds__(kScoreThreads)
    rotate_queries_kernel(float* queries, int64_t rows, int64_t dim) {
  const int channel = static_cast<int>(threadIdx.x) % kLanes * 8;
  const int64_t row =
      int64_t{blockIdx.x} * (kScoreThreads / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
  float* mine = queries + row * dim + channel;
  const bool exists = row < rows && channel < dim;
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = exists ? mine[i] : 0.0f;
  packing::rotate_row(x, dim);
  if (!exists) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) mine[i] = x[i];
}

}  // namespace tokred::cuda::scoring
