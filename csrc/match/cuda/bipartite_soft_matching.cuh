// bipartite_soft_matching: from the best match of every source to a token map, one block an item. A
// bitonic sort ranks the sources, the best leave, the survivors are numbered; see BipartiteParams
// for the rules. All of it is integer work, so that the order of atomics never shows.
#pragma once

#include "common/cuda/sort_key.cuh"
#include "match/cuda/match.cuh"

namespace tokred::cuda::matching {

// One item's memory; sizes in map_scratch_bytes.
struct MapScratch {
  uint64_t* key;  // [sort_length(sources)] (descending key of the score, row), ascending
  int* rank;  // [sources] -1 for rows that may not leave
  int* first_source;  // [N] first source row that stands here; later, a group's first member
  int* first_destination;  // [N] the same of destinations; later, the group whose first stands here
};

// Shared memory of a block beside that.
struct LargeMapShared {
  uint64_t sorting[kSortChunk];
  BlockScratch<int> partial;
};

// The scratch of a small item, in shared memory.
struct SmallMapShared {
  uint64_t key[kSmallItem];
  int rank[kSmallItem], first_source[kSmallItem], first_destination[kSmallItem];
  BlockScratch<int> partial;
};

inline constexpr int kNobody = 0x7fffffff;
inline constexpr uint64_t kNeverLeaves = ~uint64_t{0};

// Sorting ----------------------------------------------------------------------------------------

// Keys ascend as scores descend; the two largest are for sources without a match.
__device__ __forceinline__ uint32_t rank_key(float score, bool masked, bool matched) {
  if (!matched) return masked ? 0xfffffffeu : 0xffffffffu;
  return descending_key(score);
}

// The steps of one run of the bitonic network with partners stride, stride / 2, .., last apart.
// key[0] is number `offset` of the sequence. Steps within 64 keys need only their own warp.
template <int kThreads>
__device__ void bitonic_steps(uint64_t* key, int64_t length, int64_t offset, int64_t run,
                              int64_t stride, int64_t last) {
  for (; stride >= last; stride /= 2) {
    for (int64_t i = threadIdx.x; i < length / 2; i += kThreads) {
      const int64_t low = 2 * i - (i & (stride - 1)), high = low + stride;
      const uint64_t x = key[low], y = key[high];
      const bool ascending = ((offset + low) & run) == 0;
      if ((x > y) == ascending) {
        key[low] = y;
        key[high] = x;
      }
    }
    const int64_t next = stride > last ? stride / 2 : run;
    if (stride <= kWarp && next <= kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
}

template <int kThreads>
__device__ void copy_keys(uint64_t* to, const uint64_t* from, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  __syncthreads();
}

// Sorts `length` (a power of two) keys, in chunks of shared memory; `sorting` may be `key` itself.
template <int kThreads>
__device__ void sort_keys(uint64_t* key, uint64_t* sorting, int64_t length) {
  const int64_t chunk = min(length, kSortChunk);
  for (int64_t offset = 0; offset < length; offset += chunk) {
    if (sorting != key) copy_keys<kThreads>(sorting, key + offset, chunk);
    for (int64_t run = 2; run <= chunk; run *= 2) {
      bitonic_steps<kThreads>(sorting, chunk, offset, run, run / 2, 1);
    }
    __syncthreads();
    if (sorting != key) copy_keys<kThreads>(key + offset, sorting, chunk);
  }
  for (int64_t run = 2 * chunk; run <= length; run *= 2) {
    bitonic_steps<kThreads>(key, length, 0, run, run / 2, chunk);
    for (int64_t offset = 0; offset < length; offset += chunk) {
      copy_keys<kThreads>(sorting, key + offset, chunk);
      bitonic_steps<kThreads>(sorting, chunk, offset, run, chunk / 2, 1);
      copy_keys<kThreads>(key + offset, sorting, chunk);
    }
  }
}

// Mapping -----------------------------------------------------------------------------------------

template <int kThreads>
struct TokenMapper {
  const BipartiteParams& p;
  int64_t item;
  MapScratch s;
  uint64_t* sorting;
  BlockScratch<int>& partial;
  TokenRows a, b;
  int64_t prefix;
  int32_t* map;
  const float* score;
  const int32_t* index;

  __device__ TokenMapper(const BipartiteParams& p, int64_t item, const MapScratch& s,
                         uint64_t* sorting, BlockScratch<int>& partial)
      : p(p), item(item), s(s), sorting(sorting), partial(partial), a{p.match.a, item},
        b{p.match.b, item}, prefix(min(p.num_prefix, p.tokens)), map(p.token_map + item * p.tokens),
        score(p.match.score + item * p.match.a.count),
        index(p.match.index + item * p.match.a.count) {}

  template <class F>
  __device__ __forceinline__ void each(int64_t count, F f) const {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) f(i);
    __syncthreads();
  }

  // Calls f(i, rank) for the numbers i with the predicate, `rank` of which come before; returns
  // their number.
  template <class Predicate, class F>
  __device__ __forceinline__ int64_t enumerate(int64_t count, Predicate predicate, F f) {
    int64_t before = 0;
    for (int64_t begin = 0; begin < count; begin += kThreads) {
      const int64_t i = begin + threadIdx.x;
      const bool counts = i < count && predicate(i);
      int total;
      const int rank = block_exclusive_sum<kThreads>(counts, partial, total);
      if (counts) f(i, before + rank);
      before += total;
    }
    __syncthreads();
    return before;
  }

  // Gives the tokens position_of(i) >= 0 the slots from `next` on; returns the next free slot.
  template <class F>
  __device__ __forceinline__ int64_t number(int64_t next, int64_t count, F position_of) {
    return next + enumerate(
                      count,
                      [&](int64_t i) {
                        const int64_t position = position_of(i);
                        return position >= 0 && !dropped(position);
                      },
                      [&](int64_t i, int64_t rank) {
                        map[position_of(i)] = static_cast<int32_t>(next + rank);
                      });
  }

  __device__ bool dropped(int64_t position) const { return p.by_threshold && a.masked(position); }

  __device__ void find_roles() {
    each(p.tokens, [&](int64_t i) {
      s.first_source[i] = s.first_destination[i] = kNobody;
      map[i] = -1;
    });
    each(p.match.b.count, [&](int64_t t) {
      const int64_t position = b.position(t);
      if (position >= prefix) atomicMin(&s.first_destination[position], static_cast<int>(t));
    });
    each(p.match.a.count, [&](int64_t t) {
      const int64_t position = a.position(t);
      if (position >= prefix && s.first_destination[position] == kNobody) {
        atomicMin(&s.first_source[position], static_cast<int>(t));
      }
    });
  }

  // Ranks the rows that may leave; returns how many there are.
  __device__ int64_t rank_sources() {
    const int64_t sources = p.match.a.count, length = sort_length(sources);
    const auto may_leave = [&](int64_t t) {
      const int64_t position = a.position(t);
      return position >= 0 && s.first_source[position] == t;
    };
    each(length, [&](int64_t t) {
      s.key[t] = kNeverLeaves;
      if (t >= sources) return;
      s.rank[t] = -1;
      if (!may_leave(t)) return;
      const uint32_t key = rank_key(score[t], a.masked(a.position(t)), index[t] >= 0);
      s.key[t] = uint64_t{key} << 32 | static_cast<uint64_t>(t);
    });
    sort_keys<kThreads>(s.key, sorting, length);
    return enumerate(
        sources, [&](int64_t i) { return s.key[i] != kNeverLeaves; },
        [&](int64_t i, int64_t) { s.rank[row_at(i)] = static_cast<int>(i); });
  }
  __device__ int64_t row_at(int64_t rank) const { return s.key[rank] & 0xffffffffu; }

  __device__ int64_t count_leaving(int64_t count) {
    const int64_t limit = min(p.r, count);
    if (!p.by_threshold) return limit;
    const auto strong = [&](int64_t t) {
      return s.rank[t] >= 0 && index[t] >= 0 && score[t] > p.threshold;
    };
    return min(limit, enumerate(p.match.a.count, strong, [](int64_t, int64_t) {}));
  }

  __device__ bool leaves(int64_t t, int64_t leaving) const {
    return s.rank[t] >= 0 && s.rank[t] < leaving;
  }

  __device__ int64_t number_by_side(int64_t count, int64_t leaving) {
    int64_t next = number(0, p.tokens, [&](int64_t i) {
      const bool other = s.first_source[i] == kNobody && s.first_destination[i] == kNobody;
      return i < prefix || other ? i : -1;
    });
    if (p.num_prefix == 0) {
      next =
          number(next, count - leaving, [&](int64_t i) { return a.position(row_at(leaving + i)); });
    } else {
      next = number(next, p.match.a.count,
                    [&](int64_t t) { return s.rank[t] >= leaving ? a.position(t) : -1; });
    }
    return number(next, p.match.b.count, [&](int64_t t) {
      const int64_t position = b.position(t);
      return position >= 0 && s.first_destination[position] == t ? position : -1;
    });
  }

  __device__ int64_t number_by_position(int64_t leaving) {
    int *first = s.first_source, *owner = s.first_destination;
    each(p.tokens, [&](int64_t i) {
      first[i] = dropped(i) ? -1 : static_cast<int>(i);
      owner[i] = -1;
    });
    each(p.match.a.count, [&](int64_t t) {
      if (!leaves(t, leaving)) return;
      const int64_t source = a.position(t), to = index[t] < 0 ? -1 : b.position(index[t]);
      first[source] = -1;
      if (to >= 0) atomicMin(&first[to], static_cast<int>(source));
    });
    each(p.tokens, [&](int64_t i) {
      if (first[i] >= 0) owner[first[i]] = static_cast<int>(i);
    });
    return enumerate(
        p.tokens, [&](int64_t i) { return owner[i] >= 0; },
        [&](int64_t i, int64_t rank) { map[owner[i]] = static_cast<int32_t>(rank); });
  }

  __device__ void run() {
    find_roles();
    const int64_t count = rank_sources();
    const int64_t leaving = count_leaving(count);
    const int64_t slots =
        p.order == Order::tome ? number_by_side(count, leaving) : number_by_position(leaving);
    each(p.match.a.count, [&](int64_t t) {
      if (!leaves(t, leaving)) return;
      const int64_t to = index[t] < 0 ? -1 : b.position(index[t]);
      map[a.position(t)] = to < 0 ? -1 : map[to];
    });
    if (p.by_threshold) {
      if (threadIdx.x == 0) p.num_out[item] = static_cast<int32_t>(slots);
      return;
    }
    each(p.tokens, [&](int64_t i) {
      if (map[i] >= p.tokens - p.r) map[i] = -1;
    });
  }
};

// Kernels ----------------------------------------------------------------------------------------

template <class Config>
struct SmallItemShared {
  SimilarityShared<Config> match;
  SmallMapShared map;
};

// The whole of a small item.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    small_item_kernel(const __grid_constant__ BipartiteParams p) {
  auto& s = shared_memory<SmallItemShared<Config>>();
  auto& map = s.map;
  const MapScratch scratch{map.key, map.rank, map.first_source, map.first_destination};
  for (int64_t item = blockIdx.x; item < p.match.batch; item += gridDim.x) {
    for (int64_t row0 = 0; row0 < p.match.a.count; row0 += Config::kRows) {
      RowMatcher<Config>(p.match, s.match, item, row0).run();
    }
    __syncthreads();  // the scores are there
    TokenMapper<Config::kThreads>(p, item, scratch, map.key, map.partial).run();
  }
}

// The token map of a large item, from the scores of match_kernel.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    token_map_kernel(const __grid_constant__ BipartiteParams p) {
  auto& s = shared_memory<LargeMapShared>();
  const int64_t tokens = p.tokens, sources = p.match.a.count;
  char* memory = static_cast<char*>(p.match.workspace);
  for (int64_t item = blockIdx.x; item < p.match.batch; item += gridDim.x) {
    MapScratch scratch;
    scratch.key = reinterpret_cast<uint64_t*>(memory + item * map_scratch_bytes(tokens, sources));
    scratch.rank = reinterpret_cast<int*>(scratch.key + sort_length(sources));
    scratch.first_source = scratch.rank + sources;
    scratch.first_destination = scratch.first_source + tokens;
    TokenMapper<kThreads>(p, item, scratch, s.sorting, s.partial).run();
  }
}

}  // namespace tokred::cuda::matching
