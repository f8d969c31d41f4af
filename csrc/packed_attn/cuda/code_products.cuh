// Products of up to eight query rows with tiles of 32 packed keys, for attention and for scores.
// Keys are columns, so that a lane has all keys of one query.
#pragma once

#include "packed_attn/cuda/code_fragments.cuh"
#include "packed_attn/cuda/query_codes.cuh"

namespace tokred::cuda::attention {

// kQueryPlanes: two where queries are rotated, which one plane of bf16 would round.
template <int kQueryPlanes>
struct CodeConfig {
  using T = bf16;
  using Key = Split<bf16>;
  static constexpr int kDim = kCodeDim, kValueDim = kCodeDim, kPlanes = kQueryPlanes;
  static constexpr int kWarps = kCodeWarps, kThreads = kWarps * kWarp, kStages = kCodeStages;
  static constexpr int kRows = kCodeRows, kKeys = kCodeKeys, kRowLanes = kDim / 8;
  static constexpr int kSteps = kDim / 16, kParts = kKeys / 8;
};

// The query rows of a block, in two planes of bf16.
template <class C>
struct CodeQueries {
  Tile<Split<bf16>, C::kRows, C::kDim> query;
  float query_sum[C::kRows][C::kSteps];  // of the groups of keys
  alignas(16) uint32_t zeros[4];

  // For ldmatrix of the queries, to which rows 8 .. 15 are zeros.
  __device__ __forceinline__ const void* query_chunk(int plane, int step) const {
    if (lane_id() & 8) return zeros;
    return &query.plane[plane][lane_id() % 8][16 * step + lane_id() / 16 * 8];
  }
};

__device__ __forceinline__ bool in_window(int place) { return place < 0 && place != kNowhere; }

// The packed rows of one head of one side, and its window.
struct CodeRows {
  const PackedSide& side;
  const SideCopy& layout;
  const HeadTensor& window;
  const int64_t batch, head;
  const uint8_t *codes, *params;

  __device__ CodeRows(const PackedSide& side, const SideCopy& layout, const HeadTensor& window,
                      const SlotTable& slots, int64_t batch, int64_t head)
      : side(side), layout(layout), window(window), batch(batch), head(head) {
    const PackedRows& packed = side.packed;
    const int64_t item = slots.data ? 0 : batch;
    codes = kept(packed.codes + item * packed.codes_stride_batch + head * packed.codes_stride_head);
    params =
        kept(packed.params + item * packed.params_stride_batch + head * packed.params_stride_head);
  }

  __device__ __forceinline__ const PackFormat& format() const { return side.packed.format; }
  __device__ __forceinline__ void copy(uint8_t* stage, const int* places) const {
    copy_code_rows<kCodeLanes>(stage, layout.codes, codes, side.packed.codes_stride_token, places);
    copy_code_rows<1>(stage + kCodeKeys * layout.codes.pitch, layout.params, params,
                      2 * side.packed.params_stride_row, places);
  }
  // In a register, not computed again for every tile.
  static __device__ __forceinline__ const uint8_t* kept(const void* p) {
    return reinterpret_cast<const uint8_t*>(
        optimization_barrier(static_cast<int64_t>(reinterpret_cast<uintptr_t>(p))));
  }
  // Of a lane's token.
  __device__ __forceinline__ const uint8_t* param_row(const uint8_t* stage) const {
    return stage + kCodeKeys * layout.codes.pitch + lane_id() * layout.params.pitch;
  }

  // Put numbers of the window, from a channel on, in place of codes: in the order in which
  // CodeStep::pairs() has keys, and that in which it has values.
  __device__ __forceinline__ void replace_keys(uint32_t (&pair)[kCodeKeys / 8][2],
                                               const int* places, int channel) const {
#pragma unroll
    for (int n = 0; n < kCodeKeys / 8; ++n) {
      const int place = places[8 * n + lane_id() / 4];
      if (!in_window(place)) continue;
      const bf16* x = window_row(place) + channel + lane_id() % 4 * 4;
      pair[n][0] = pack(x[0], x[2]);
      pair[n][1] = pack(x[1], x[3]);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void replace_values(uint32_t (&pair)[kCodeKeys / 8][2],
                                                 const int* places, int channel) const {
#pragma unroll
    for (int n = 0; n < kCodeKeys / 8; ++n) {
#pragma unroll
      for (int token = 0; token < 2; ++token) {
        const int place = places[8 * n + lane_id() % 4 * 2 + token], shift = 16 * token;
        if (!in_window(place)) continue;
        const bf16* x = window_row(place) + channel + lane_id() / 4 * 2;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          pair[n][e] = (pair[n][e] & ~(0xffffu << shift)) | uint32_t{x[e].bits} << shift;
        }
      }
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ const bf16* window_row(int place) const {
    return static_cast<const bf16*>(window.data) +
           optimization_barrier(batch) * window.stride_batch + head * window.stride_head +
           (-1 - place) * window.stride_token;
  }
};

// The words of a step of all 32 rows of a tile.
template <bool kTransposed>
__device__ __forceinline__ void load_words(uint32_t (&word)[kCodeKeys / 8], const uint8_t* stage,
                                           int pitch, const CodeStep& step) {
  const uint8_t* row = stage + lane_id() * pitch + step.byte();
  if constexpr (kTransposed) {
    ldmatrix_x4_trans(word, row);
  } else {
    ldmatrix_x4(word, row);
  }
}

// From the order of order_codes() to that of CodeStep::pairs(), where a lane's four channels are
// columns 2 (lane % 4), 2 (lane % 4) + 1 and the same plus eight of a step: of four pairs two are
// exchanged. After a barrier.
template <class C>
__device__ __forceinline__ void order_queries(CodeQueries<C>& shared) {
  constexpr int kPlanes = 2;
  if (threadIdx.x < 4) shared.zeros[threadIdx.x] = 0;
  for (int i = static_cast<int>(threadIdx.x); i < kPlanes * C::kRows * C::kSteps;
       i += C::kThreads) {
    const int row = i / C::kSteps, step = i % C::kSteps;
    auto* x = &shared.query.plane[row / C::kRows][row % C::kRows][16 * step];
    const Chunk first = load_chunk(x), second = load_chunk(x + 8);
    store_chunk(x, {{first.word[0], first.word[2], second.word[0], second.word[2]}});
    store_chunk(x + 8, {{first.word[1], first.word[3], second.word[1], second.word[3]}});
  }
}

// Products of the queries with the keys of a tile.
template <class C>
__device__ __forceinline__ void multiply_codes(float (&out)[1][C::kParts][4], const CodeRows& rows,
                                               const CodeQueries<C>& shared,
                                               const CodeScales& scales, const uint8_t* stage,
                                               const int* places, bool windows) {
  const PackFormat& f = rows.format();
  const int dim = static_cast<int>(f.head_dim), size = static_cast<int>(f.group_size);
  float part[C::kParts][4] = {};
#pragma unroll
  for (int n = 0; n < C::kParts; ++n) out[0][n][0] = out[0][n][1] = 0.0f;
  CodeStep step(f.bits);
  int group = 0, end = size;
#pragma unroll
  for (int i = 0; i < C::kSteps; ++i) {
    if (16 * i >= dim) break;
    uint32_t word[C::kParts];
    load_words<false>(word, stage, rows.layout.codes.pitch, step);
    uint32_t b[C::kParts][2];
#pragma unroll
    for (int n = 0; n < C::kParts; ++n) step.pairs(b[n], word[n]);
    step.advance();
    if (windows) rows.replace_keys(b, places, 16 * i);
#pragma unroll
    for (int plane = C::kPlanes - 1; plane >= 0; --plane) {
      uint32_t a[4];
      ldmatrix_x4(a, shared.query_chunk(plane, i));
#pragma unroll
      for (int n = 0; n < C::kParts; ++n) mma(bf16{}, part[n], a, b[n]);
    }
    if (16 * (i + 1) != end) continue;
    const float sum = shared.query_sum[lane_id() / 4][group];
#pragma unroll
    for (int n = 0; n < C::kParts; ++n) {
      const float4 s = scales.pair(group, n);
      out[0][n][0] = fmaf(s.x, part[n][0], fmaf(s.y, sum, out[0][n][0]));
      out[0][n][1] = fmaf(s.z, part[n][1], fmaf(s.w, sum, out[0][n][1]));
#pragma unroll
      for (int e = 0; e < 4; ++e) part[n][e] = 0.0f;
    }
    ++group;
    end += size;
  }
}

}  // namespace tokred::cuda::attention
