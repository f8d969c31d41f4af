// compact: stream compaction of the positions that a row marks, or of the entries of a list.
#pragma once

#include "common/cuda/block.cuh"
#include "topk/cuda/key.cuh"
#include "topk/cuda/plan.h"

namespace tokred::cuda::selecting {

// Entries of a row that a thread tests at once, as the bits of a mask.
struct BoolTest {
  using Element = uint8_t;
  static constexpr bool kList = false;

  __device__ explicit BoolTest(const CompactParams&) {}
  __device__ __forceinline__ bool operator()(uint8_t x) const { return x != 0; }
  __device__ __forceinline__ bool at(const Chunk& chunk, int i) const {
    return chunk.word[i / 4] >> 8 * (i % 4) & 0xff;
  }
};
struct ListTest {
  using Element = int32_t;
  static constexpr bool kList = true;

  __device__ explicit ListTest(const CompactParams&) {}
  __device__ __forceinline__ bool operator()(int32_t x) const { return x >= 0; }
  __device__ __forceinline__ bool at(const Chunk& chunk, int i) const {
    return static_cast<int32_t>(chunk.word[i]) >= 0;
  }
};
template <class T>
struct FloatTest {
  using Element = T;
  static constexpr bool kList = false;
  float threshold;

  __device__ explicit FloatTest(const CompactParams& p) : threshold(p.threshold) {}
  __device__ __forceinline__ bool operator()(T x) const { return to_float(x) > threshold; }
  __device__ __forceinline__ bool at(const Chunk& chunk, int i) const {
    return element<T>(chunk, i) > threshold;
  }
};

template <class Test>
struct MarkedRow {
  using Element = typename Test::Element;
  static constexpr int kOfChunk = 16 / sizeof(Element);
  Test test;
  const Element* row;
  int64_t end;  // the length
  bool aligned;

  __device__ MarkedRow(const CompactParams& p, int64_t r)
      : test(p), row(row_start<Element>(p.selected, r)), end(row_number(p.lengths, r, p.columns)),
        aligned(is_aligned(row, 0, 1)) {}

  // Bit i: entry j + i is marked. j is a multiple of kCompactWidth.
  __device__ __forceinline__ unsigned marks(int64_t j) const {
    unsigned mask = 0;
    if (aligned && j + kCompactWidth <= end) {
      Chunk chunk[kCompactWidth / kOfChunk];
#pragma unroll
      for (int c = 0; c < kCompactWidth / kOfChunk; ++c) {
        chunk[c] = load_chunk(row + j + c * kOfChunk);
      }
#pragma unroll
      for (int i = 0; i < kCompactWidth; ++i) {
        mask |= static_cast<unsigned>(test.at(chunk[i / kOfChunk], i % kOfChunk)) << i;
      }
      return mask;
    }
#pragma unroll
    for (int i = 0; i < kCompactWidth; ++i) {
      if (j + i < end) mask |= static_cast<unsigned>(test(row[j + i])) << i;
    }
    return mask;
  }
};

// A block packs part `blockIdx.x % parts` of a row, after counting the marks before it.
template <class Test>
__global__ void __launch_bounds__(kCompactThreads, 2)
    compact_kernel(const __grid_constant__ CompactParams p, int64_t parts) {
  auto& scratch = shared_memory<BlockScratch<int>>();
  const int64_t columns =
      (p.columns + parts * kCompactTile - 1) / (parts * kCompactTile) * kCompactTile;
  const int64_t own = int64_t{threadIdx.x} * kCompactWidth;
  for (int64_t block = blockIdx.x; block < p.rows * parts; block += gridDim.x) {
    const int64_t r = block / parts, part = block % parts;
    const MarkedRow<Test> row(p, r);
    const int64_t begin = min(part * columns, row.end), end = min(begin + columns, row.end);
    int32_t* indices = p.indices + r * p.capacity;
    int count = 0, total;
    for (int64_t j = own; j < begin; j += kCompactTile) count += __popc(row.marks(j));
    block_exclusive_sum<kCompactThreads>(count, scratch, total);
    int64_t before = total;
    for (int64_t tile = begin; tile < end && before < p.capacity; tile += kCompactTile) {
      unsigned marks = tile + own < end ? row.marks(tile + own) : 0;
      int64_t slot = before + block_exclusive_sum<kCompactThreads>(__popc(marks), scratch, total);
      for (; marks && slot < p.capacity; marks &= marks - 1) {
        const int64_t j = tile + own + __ffs(marks) - 1;
        if constexpr (Test::kList) {
          indices[slot++] = row.row[j];
        } else {
          indices[slot++] = static_cast<int32_t>(j);
        }
      }
      before += total;
    }
    if (part != parts - 1) continue;
    before = min(before, p.capacity);
    if (threadIdx.x == 0) p.counts[r] = static_cast<int32_t>(before);
    for (int64_t e = before + threadIdx.x; e < p.capacity; e += kCompactThreads) indices[e] = -1;
  }
}

}  // namespace tokred::cuda::selecting
