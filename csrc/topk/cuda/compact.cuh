// The positions of what a row marks, and gathers of the tokens at positions.
#pragma once

#include "common/cuda/block.cuh"
#include "topk/cuda/key.cuh"
#include "topk/cuda/plan.h"

namespace tokred::cuda::selecting {

// Entries of a row that a thread tests at once, as the bits of a mask.
struct BoolTest {
  using Element = uint8_t;

  __device__ explicit BoolTest(const CompactParams&) {}
  __device__ __forceinline__ bool operator()(uint8_t x) const { return x != 0; }
  __device__ __forceinline__ bool at(const Chunk& chunk, int i) const {
    return chunk.word[i / 4] >> 8 * (i % 4) & 0xff;
  }
};
template <class T>
struct FloatTest {
  using Element = T;
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
  int64_t end;        // the length
  bool aligned;

  __device__ MarkedRow(const CompactParams& p, int64_t r)
      : test(p), row(row_start<Element>(p.selected, r)), end(row_number(p.lengths, r, p.columns)),
        aligned(reinterpret_cast<uintptr_t>(row) % 16 == 0) {}

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

// A block packs part `blockIdx.x % parts` of a row, after counting what lies before.
template <class Test>
__global__ void __launch_bounds__(kCompactThreads, 2)
    compact_kernel(const __grid_constant__ CompactParams p, int64_t parts) {
  auto& scratch = shared_memory<BlockScratch<int>>();
  const int64_t columns = (p.columns + parts * kCompactTile - 1) / (parts * kCompactTile) *
                          kCompactTile;
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
      int64_t place = before + block_exclusive_sum<kCompactThreads>(__popc(marks), scratch, total);
      for (; marks && place < p.capacity; marks &= marks - 1) {
        indices[place++] = static_cast<int32_t>(tile + own + __ffs(marks) - 1);
      }
      before += total;
    }
    if (part != parts - 1) continue;
    before = min(before, p.capacity);
    if (threadIdx.x == 0) p.counts[r] = static_cast<int32_t>(before);
    for (int64_t e = before + threadIdx.x; e < p.capacity; e += kCompactThreads) indices[e] = -1;
  }
}

// Gathers ----------------------------------------------------------------------------------------

struct GatherLaunch {
  bool wide[kMaxGatherItems];  // whether an item's rows are copied 16 bytes at a time
};

template <class Unit>
__device__ __forceinline__ void gather_row(const GatherItem& item, const char* source, char* out,
                                           int lane, int lanes) {
  const int64_t units = item.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const auto* from = reinterpret_cast<const Unit*>(source);
  auto* to = reinterpret_cast<Unit*>(out);
#pragma unroll 4
  for (int64_t u = lane; u < units; u += lanes) to[u] = source ? from[u] : Unit{};
}

// Item blockIdx.y; groups of lanes own rows.
static __global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(const __grid_constant__ GatherParams p,
                  const __grid_constant__ GatherLaunch launch) {
  const GatherItem& item = p.item[blockIdx.y];
  const bool wide = launch.wide[blockIdx.y];
  const int lanes = gather_lanes(wide ? item.row_bytes / 16 : item.row_bytes);
  const int lane = static_cast<int>(threadIdx.x) % lanes, groups = kGatherThreads / lanes;
  const int64_t rows = p.batch * item.heads * p.count;
  for (int64_t r = int64_t{blockIdx.x} * groups + threadIdx.x / lanes; r < rows;
       r += int64_t{gridDim.x} * groups) {
    const int64_t list = r / p.count, b = list / item.heads, h = list - b * item.heads;
    const int64_t token = p.indices[b * p.index_stride_batch + h * p.index_stride_head +
                                    (r - list * p.count)];
    const char* source = nullptr;
    if (token >= 0 && token < item.tokens) {
      source = static_cast<const char*>(item.source) + b * item.stride_batch +
               h * item.stride_head + token * item.stride_token;
    }
    char* out = static_cast<char*>(item.out) + r * item.row_bytes;
    if (wide) {
      gather_row<Chunk>(item, source, out, lane, lanes);
    } else {
      gather_row<char>(item, source, out, lane, lanes);
    }
  }
}

}  // namespace tokred::cuda::selecting
