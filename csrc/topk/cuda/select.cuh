// topk by one block a segment. From a sample the block guesses a key that somewhat more entries
// than wanted do not exceed, and reads the segment once to collect those; where the guess was
// wrong, radix select over the whole segment finds a better one. The entries collected are then
// reduced to the k wanted by radix select, and sorted by buckets: a histogram says where each bin's
// keys go, and within its bin a key counts those before it. Where a bin has too many for that, a
// bitonic network sorts.
#pragma once

#include "topk/cuda/narrow.cuh"
#include "topk/cuda/sort.cuh"

namespace tokred::cuda::selecting {

struct SmallSelect {
  static constexpr TopkTiles kTiles = kSmallTopk;
  static constexpr int kBlocks = 3;  // an SM, as registers allow
  static constexpr int kThreads = kTiles.threads, kKeys = kTiles.keys, kChosen = kTiles.chosen;
};
struct WideSelect {
  static constexpr TopkTiles kTiles = kWideTopk;
  static constexpr int kBlocks = 2;
  static constexpr int kThreads = kTiles.threads, kKeys = kTiles.keys, kChosen = kTiles.chosen;
};

template <class C>
struct SelectShared {
  uint64_t key[C::kKeys];  // collected; a sample before, exchange of the sort afterwards
  uint64_t chosen[C::kChosen];
  NarrowShared<C::kThreads> narrow;
};

// Collecting -------------------------------------------------------------------------------------

// The count once the whole block has pushed; it may be reset afterwards.
template <int kThreads>
__device__ __forceinline__ int pushed(const NarrowShared<kThreads>& s) {
  __syncthreads();
  const int count = s.count;
  __syncthreads();
  return count;
}

inline constexpr int kSampleRun = 8;  // neighbours of a sample

// Two samples of the same segment are the same. Four standard deviations above the expected rank
// make it likely that the guess suffices, three quarters of the capacity that it is not too much:
// of 131072 entries, k = 2048, the 4096 sampled expect rank 64, and the guess has rank 64 + 32 + 4
// + 1.
template <class C, class T>
__device__ uint64_t guess_key(const Segment<T>& segment, SelectShared<C>& s) {
  const int n = segment.end - segment.begin;
  if (n <= C::kKeys) return kLastKey;
  const int samples = n <= 32 * C::kKeys ? C::kKeys / 2 : C::kKeys;
  const int step = n / (samples / kSampleRun);
  each_entry<C::kThreads>(0, samples, [&](int64_t i) {
    s.key[i] = segment.key(segment.begin + i / kSampleRun * step + i % kSampleRun);
  });
  const float share = static_cast<float>(samples) / static_cast<float>(n);
  const float expected = static_cast<float>(segment.wanted) * share;
  const float limit = max(expected, 0.75f * C::kKeys * share);
  const int rank = 1 + static_cast<int>(min(expected + 4.0f * sqrtf(expected) + 4.0f, limit));
  const uint64_t high = narrow<C::kThreads>(
      {0, kLastKey}, rank, rank + rank / 4, s.narrow,
      [&](auto f) { each_entry<C::kThreads>(0, samples, [&](int64_t i) { f(s.key[i]); }); });
  return high == kLastKey ? high : high | kPositionMask;
}

// f(j) for every entry of [begin, end) that is forced or has a score of at least `min_score`, and
// perhaps for others. Reads 16 bytes a thread at a time, four times in a row.
template <int kThreads, class T, class F>
__device__ __forceinline__ void each_strong(const Segment<T>& segment, int64_t begin, int64_t end,
                                            float min_score, F f) {
  constexpr int kWidth = 16 / sizeof(T), kUnroll = 4;
  const auto address = reinterpret_cast<uintptr_t>(segment.scores + begin);
  const int64_t first = min(end, begin + static_cast<int64_t>(-address % 16 / sizeof(T)));
  const int64_t last = first + (end - first) / kWidth * kWidth;
  each_entry<kThreads>(begin, first, f);
  each_entry<kThreads>(last, end, f);
  for (int64_t j = first + int64_t{threadIdx.x} * kWidth; j < last;
       j += kThreads * kWidth * kUnroll) {
    Chunk chunk[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = j + u * kThreads * kWidth;
      if (at < last) chunk[u] = load_chunk(segment.scores + at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = j + u * kThreads * kWidth;
      if (at >= last) continue;
      unsigned strong = 0;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        strong |= static_cast<unsigned>(element<T>(chunk[u], i) >= min_score) << i;
      }
      const auto position = static_cast<int>(at);
      if (segment.must_keep || position < segment.sinks_end ||
          position > segment.locals_begin - kWidth) {
        for (int i = 0; i < kWidth; ++i)
          strong |= static_cast<unsigned>(segment.forced(at + i)) << i;
      }
      for (; strong; strong &= strong - 1) f(at + __ffs(strong) - 1);
    }
  }
}

// Pushes the keys of [begin, end) up to `high`, in any order; returns their number, of which those
// beyond C::kKeys are lost.
template <class C, class T>
__device__ int collect(const Segment<T>& segment, int64_t begin, int64_t end, uint64_t high,
                       SelectShared<C>& s) {
  if (threadIdx.x == 0) s.narrow.count = 0;
  __syncthreads();
  const uint32_t last = min(static_cast<uint32_t>(high >> kPositionBits), score_key(-kInfinity));
  const float min_score = high < kCandidateBit ? kInfinity : from_descending_key(last);
  each_strong<C::kThreads>(segment, begin, end, min_score, [&](int64_t j) {
    const uint64_t key = segment.key(j);
    if (key > high) return;
    const int slot = atomicAdd(&s.narrow.count, 1);
    if (slot < C::kKeys) s.key[slot] = key;
  });
  return pushed(s.narrow);
}

// Whether a guess with `count` keys up to it suffices.
template <class C, class T>
__device__ __forceinline__ bool suffices(const Segment<T>& segment, int64_t count, uint64_t guess) {
  return count <= C::kKeys && (count >= segment.wanted || guess == kLastKey);
}

// Collects the keys after a guess that was wrong; the first histogram is of the scores equal to the
// guessed one, of which there may be very many.
template <class C, class T>
__device__ int collect_exactly(const Segment<T>& segment, uint64_t guess, SelectShared<C>& s) {
  KeyRange range{0, kLastKey};
  if (guess != kLastKey) {
    range.low = guess & ~kPositionMask;
    range.high = range.low | static_cast<uint64_t>(segment.end - 1);
  }
  const uint64_t high = narrow<C::kThreads>(range, segment.wanted, C::kKeys, s.narrow, [&](auto f) {
    each_entry<C::kThreads>(segment.begin, segment.end, [&](int64_t j) { f(segment.key(j)); });
  });
  return collect(segment, segment.begin, segment.end, high, s);
}

// Choosing ---------------------------------------------------------------------------------------

// The first `wanted` of the n keys go to `chosen`, rotated where they are to be sorted by position;
// returns their number.
template <class C>
__device__ int choose(int n, int wanted, bool rotated, SelectShared<C>& s) {
  constexpr int kThreads = C::kThreads;
  const auto each = [&](auto f) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) f(s.key[i]);
  };
  uint64_t high = kLastKey;
  if (n > wanted) {
    uint64_t min_key = kNoKey, max_key = 0;
    each([&](uint64_t key) {
      min_key = min(min_key, key);
      max_key = max(max_key, key);
    });
    const KeyRange range{~block_max<kThreads>(~min_key, s.narrow.partial_keys),
                         block_max<kThreads>(max_key, s.narrow.partial_keys)};
    high = narrow<kThreads>(range, wanted, wanted, s.narrow, each);
  }
  if (threadIdx.x == 0) s.narrow.count = 0;
  __syncthreads();
  each([&](uint64_t key) {
    if (key > high) return;
    s.chosen[atomicAdd(&s.narrow.count, 1)] = rotated ? by_position(key) : key;
  });
  return pushed(s.narrow);
}

inline constexpr int kMaxBucket = 64;

// Sorts the n chosen keys, which all differ.
template <class C>
__device__ void sort_chosen(int n, SelectShared<C>& s) {
  constexpr int kThreads = C::kThreads, kOwn = kTopkBins / kThreads;
  const auto each = [&](const uint64_t* keys, auto f) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) f(keys[i]);
  };
  uint64_t max_complement = 0, max_key = 0;
  each(s.chosen, [&](uint64_t key) {
    max_complement = max(max_complement, ~key);
    max_key = max(max_key, key);
  });
  const uint64_t low = ~block_max<kThreads>(max_complement, s.narrow.partial_keys);
  const uint64_t range = block_max<kThreads>(max_key, s.narrow.partial_keys) - low;
  const int shift = max(0, 64 - __clzll(range) - 11);
  int* bins = s.narrow.histogram;
  const auto bin_of = [&](uint64_t key) { return static_cast<int>((key - low) >> shift); };
  for (int i = static_cast<int>(threadIdx.x); i < kTopkBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  each(s.chosen, [&](uint64_t key) { atomicAdd(&bins[bin_of(key)], 1); });
  __syncthreads();
  int* own = bins + threadIdx.x * kOwn;
  int sum = 0, largest = 0, total;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    sum += own[i];
    largest = max(largest, own[i]);
  }
  if (__syncthreads_or(largest > kMaxBucket)) {
    return sort_shared<kThreads, C::kChosen / kThreads>(s.chosen, n, s.key);
  }
  int before = block_exclusive_sum<kThreads>(sum, s.narrow.partial, total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int count = own[i];
    own[i] = before;
    before += count;
  }
  __syncthreads();
  // Where a bin begins moves on to where it ends, which is where the next one began.
  each(s.chosen, [&](uint64_t key) { s.key[atomicAdd(&bins[bin_of(key)], 1)] = key; });
  __syncthreads();
  each(s.key, [&](uint64_t key) {
    const int bin = bin_of(key), end = bins[bin];
    const int begin = bin > 0 ? bins[bin - 1] : 0;
    int rank = begin;
    for (int i = begin; i < end; ++i) rank += s.key[i] < key;
    s.chosen[rank] = key;
  });
  __syncthreads();
}

// The number of sorted keys, of n, that it takes to exceed top_p, at least min_k. Sums saturate
// just above the limit, which keeps them within 64 bits.
template <int kThreads>
__device__ int64_t count_to_top_p(const TopkParams& p, const uint64_t* sorted, int64_t n,
                                  BlockScratch<uint64_t>& scratch, BlockScratch<int>& partial) {
  constexpr float kMaxProbability = 1 << 20;
  constexpr float kOne = static_cast<float>(int64_t{1} << kProbabilityBits);
  if (p.top_p < 0) return min(n, max(p.min_k, int64_t{1}));
  const double share = min(p.top_p, double{kMaxProbability});
  const uint64_t limit = static_cast<uint64_t>(share * kOne);
  const auto add = [&](uint64_t x, uint64_t y) { return min(x + y, limit + 1); };
  const auto share_of = [&](int64_t i) {
    const float score = max(score_of_key(sorted[i]), 0.0f);
    return static_cast<uint64_t>(min(score, kMaxProbability) * kOne);
  };
  const int64_t own = (n + kThreads - 1) / kThreads;
  const int64_t begin = min(n, threadIdx.x * own), end = min(n, begin + own);
  uint64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum = add(sum, share_of(i));
  uint64_t total = block_exclusive_scan<kThreads>(sum, scratch, add);
  int within = 0, all;
  for (int64_t i = begin; i < end; ++i) {
    total = add(total, share_of(i));
    within += total <= limit;
  }
  block_exclusive_sum<kThreads>(within, partial, all);
  return min(n, max(p.min_k, int64_t{all} + 1));
}

// Orders the best `wanted` of the n keys collected, and writes the segment's row of the outputs.
template <class C>
__device__ void finish(const TopkParams& p, int64_t segment, int n, int wanted,
                       SelectShared<C>& s) {
  constexpr int kThreads = C::kThreads;
  const bool position = p.order == RowOrder::position;
  int count = min(wanted, n);
  if (count > 0) {
    choose(n, count, position && !p.has_top_p, s);
    bool is_whole = p.has_top_p;
#pragma unroll 1
    for (;;) {
      sort_chosen(count, s);
      if (!is_whole) break;
      is_whole = false;
      count = static_cast<int>(
          count_to_top_p<kThreads>(p, s.chosen, count, s.narrow.partial_keys, s.narrow.partial));
      if (!position) break;
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        s.chosen[i] = by_position(s.chosen[i]);
      }
      __syncthreads();
    }
  }
  for (int64_t e = threadIdx.x; e < p.k; e += kThreads) {
    const uint64_t key = e < count ? s.chosen[e] : kNoKey;
    write_slot(p, segment * p.k + e, e < count, position ? by_rank(key) : key);
  }
  if (threadIdx.x == 0) p.counts[segment] = count;
  __syncthreads();
}

}  // namespace tokred::cuda::selecting
