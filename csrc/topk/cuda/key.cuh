// Sort keys of topk: entries of a row as integers that ascend in the order in which they are
// chosen.
#pragma once

#include "common/cuda/chunk.cuh"
#include "common/cuda/sort_key.cuh"
#include "topk/params.h"

namespace tokred::cuda::selecting {

// A key: 0 where forced else 1, the descending key of the score (32 bits), the position (31 bits).
// No two entries of a row have the same.
inline constexpr int kPositionBits = 31;
inline constexpr uint64_t kPositionMask = (uint64_t{1} << kPositionBits) - 1;
inline constexpr uint64_t kCandidateBit = uint64_t{1} << 63;
inline constexpr uint64_t kNoKey = ~uint64_t{0};  // of entries that are neither
inline constexpr uint64_t kLastKey = kNoKey - 1;  // the largest key

// The descending key of a score as it is ranked: NaN as -inf, and -0 as 0.
__device__ __forceinline__ uint32_t score_key(float score) {
  return descending_key(score > -kInfinity ? score + 0.0f : -kInfinity);
}
__device__ __forceinline__ float score_of_key(uint64_t key) {
  return from_descending_key(static_cast<uint32_t>(key >> kPositionBits));
}
__device__ __forceinline__ int32_t position_of(uint64_t key) {
  return static_cast<int32_t>(key & kPositionMask);
}
__device__ __forceinline__ uint64_t candidate_key(uint32_t score_key, int64_t j) {
  return kCandidateBit | uint64_t{score_key} << kPositionBits | static_cast<uint64_t>(j);
}

// Number i of the elements that 16 bytes hold.
template <class T>
__device__ __forceinline__ float element(const Chunk& chunk, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(chunk.word[i]);
  } else {
    return to_float(T{static_cast<uint16_t>(chunk.word[i / 2] >> 16 * (i % 2))});
  }
}

// Keys rotated by bits so that they ascend by position, and back.
__device__ __forceinline__ uint64_t by_position(uint64_t key) {
  return key << (64 - kPositionBits) | key >> kPositionBits;
}
__device__ __forceinline__ uint64_t by_rank(uint64_t key) {
  return key >> (64 - kPositionBits) | key << kPositionBits;
}

// Where row `row` of the view begins. Divisions of 64 bits are slow, and few rows need them.
__device__ __forceinline__ int64_t row_offset(const RowView& view, int64_t row) {
  const auto split = [](int64_t n, int64_t by, int64_t& rest) {
    if (by == 1) {
      rest = 0;
      return n;
    }
    const bool narrow = ((n | by) >> 32) == 0;
    const int64_t quotient =
        narrow ? int64_t{static_cast<uint32_t>(n) / static_cast<uint32_t>(by)} : n / by;
    rest = n - quotient * by;
    return quotient;
  };
  int64_t first, second, third;
  first = split(split(row, view.size[2], third), view.size[1], second);
  return first * view.stride[0] + second * view.stride[1] + third * view.stride[2];
}
template <class T>
__device__ __forceinline__ const T* row_start(const RowView& view, int64_t row) {
  if (!view.data) return nullptr;
  return static_cast<const T*>(view.data) + row_offset(view, row);
}
// The number of an i32 [R] for the row, within [0, limit]; the limit where there is none.
__device__ __forceinline__ int64_t row_number(const RowView& view, int64_t row, int64_t limit) {
  const int32_t* number = row_start<int32_t>(view, row);
  return number ? min(max(int64_t{*number}, int64_t{0}), limit) : limit;
}

// A segment of a row: its entries [begin, end), all before the row's length.
template <class T>
struct Segment {
  const T* scores;
  const bool* must_keep;  // or null
  int begin, end;
  int sinks_end, locals_begin;
  float floor;  // a candidate's score is above
  int wanted;   // entries to choose, at most end - begin

  __device__ Segment(const TopkParams& p, int64_t segment) {
    const int64_t row = p.segments == 1 ? segment : segment / p.segments;
    const int64_t length = row_number(p.lengths, row, p.columns);
    const int64_t first = min((segment - row * p.segments) * p.block_size, length);
    begin = static_cast<int>(first);
    end = static_cast<int>(p.segments == 1 ? length : min(first + p.block_size, length));
    scores = row_start<T>(p.scores, row);
    must_keep = row_start<bool>(p.must_keep, row);
    sinks_end = static_cast<int>(min(p.num_sinks, length));
    locals_begin = static_cast<int>(max(length - p.num_locals, int64_t{0}));
    floor = p.has_threshold ? p.threshold : -kInfinity;
    wanted = static_cast<int>(min(row_number(p.row_k, row, p.k), int64_t{end} - begin));
  }
  __device__ __forceinline__ bool forced(int64_t j) const {
    return j < sinks_end || j >= locals_begin || (must_keep && must_keep[j]);
  }
  __device__ __forceinline__ uint64_t key(int64_t j) const {
    const float score = to_float(scores[j]);
    const uint64_t key = candidate_key(score_key(score), j);
    if (forced(j)) return key & ~kCandidateBit;
    return score > floor ? key : kNoKey;
  }
};

// f(j) for every entry of [begin, end), by the whole block.
template <int kThreads, class F>
__device__ __forceinline__ void each_entry(int64_t begin, int64_t end, F f) {
  for (int64_t j = begin + threadIdx.x; j < end; j += kThreads) f(j);
}

// Slot e of a row of the outputs: the key's entry, or none.
__device__ __forceinline__ void write_slot(const TopkParams& p, int64_t slot, bool chosen,
                                           uint64_t key) {
  p.values[slot] = chosen ? score_of_key(key) : -kInfinity;
  p.indices[slot] = chosen ? position_of(key) : -1;
}

}  // namespace tokred::cuda::selecting
