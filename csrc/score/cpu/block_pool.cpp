// block_pool on the CPU: one pass over the tokens, and for deviations a second one over each block
// that is still in cache.
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "common/cpu/sizes.h"
#include "score/params.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int64_t kPartTokens = 64;  // tokens summed before they are added to the total
constexpr int64_t kVectors = kMaxHeadDim / kLanes;

struct TokenRange {
  int64_t first, end;
};

TokenRange block_range(const BlockPoolParams& p, int64_t item, int64_t block) {
  TokenRange range;
  if (p.boundaries) {
    const int32_t* edge = p.boundaries + item * p.boundaries_stride_batch + block;
    range = {edge[0], edge[1]};
  } else {
    range = {block * p.block_size, (block + 1) * p.block_size};
  }
  int64_t end = p.tokens;
  if (p.lengths && p.lengths[item * p.lengths_stride] < end) {
    end = p.lengths[item * p.lengths_stride];
  }
  return {range.first > 0 ? range.first : 0, range.end < end ? range.end : end};
}

// Statistics of one head's tokens, sixteen channels a vector.
template <class T>
struct Pool {
  const BlockPoolParams& p;
  const T* tokens;
  const bool* mask;
  const int64_t vectors;
  f32x16 part[kVectors], total[kVectors], other[kVectors];

  Pool(const BlockPoolParams& params, int64_t item, int64_t head)
      : p(params),
        tokens(static_cast<const T*>(p.x.data) + item * p.x.stride_batch + head * p.x.stride_head),
        mask(p.mask ? p.mask + item * p.mask_stride_batch : nullptr),
        vectors(divide_up(p.head_dim, kLanes)) {}

  bool visible(int64_t t) const { return !mask || mask[t * p.mask_stride_token]; }
  __attribute__((always_inline)) f32x16 channels(const T* token, int64_t v) const {
    return load_row(token + v * kLanes, p.head_dim - v * kLanes);
  }

  int64_t count(TokenRange range) const {
    if (range.end <= range.first) return 0;
    if (!mask) return range.end - range.first;
    int64_t number = 0;
    for (int64_t t = range.first; t < range.end; ++t) number += visible(t);
    return number;
  }

  // total = the sums of value(token's channels, vector) over the visible tokens.
  template <class Value>
  void add(TokenRange range, const Value& value) {
    for (int64_t v = 0; v < vectors; ++v) total[v] = splat(0.0f);
    for (int64_t first = range.first; first < range.end; first += kPartTokens) {
      const int64_t end = first + kPartTokens < range.end ? first + kPartTokens : range.end;
      for (int64_t v = 0; v < vectors; ++v) part[v] = splat(0.0f);
      for (int64_t t = first; t < end; ++t) {
        if (!visible(t)) continue;
        const T* token = tokens + t * p.x.stride_token;
        for (int64_t v = 0; v < vectors; ++v) part[v] = part[v] + value(channels(token, v), v);
      }
      for (int64_t v = 0; v < vectors; ++v) total[v] = total[v] + part[v];
    }
  }

  // total = the mean.
  void mean(TokenRange range, int64_t number) {
    add(range, [](f32x16 x, int64_t) { return x; });
    for (int64_t v = 0; v < vectors; ++v) total[v] = total[v] / splat(static_cast<float>(number));
  }

  void extremes(TokenRange range) {
    for (int64_t v = 0; v < vectors; ++v) {
      total[v] = splat(kInfinity<float>);
      other[v] = splat(-kInfinity<float>);
    }
    for (int64_t t = range.first; t < range.end; ++t) {
      if (!visible(t)) continue;
      const T* token = tokens + t * p.x.stride_token;
      for (int64_t v = 0; v < vectors; ++v) {
        const f32x16 x = channels(token, v);
        total[v] = min(x, total[v]);
        other[v] = max(x, other[v]);
      }
    }
  }

  void deviation(TokenRange range, int64_t number) {
    mean(range, number);
    for (int64_t v = 0; v < vectors; ++v) other[v] = total[v];
    add(range, [&](f32x16 x, int64_t v) {
      const f32x16 distance = x - other[v];
      return max(distance, splat(0.0f) - distance);
    });
    for (int64_t v = 0; v < vectors; ++v) {
      const f32x16 spread = total[v] / splat(static_cast<float>(number));
      total[v] = other[v];
      other[v] = spread;
    }
  }

  void write(const f32x16* from, float* to) const {
    for (int64_t v = 0; v < vectors; ++v) {
      store_row(to + v * kLanes, from[v], p.head_dim - v * kLanes);
    }
  }

  void run(TokenRange range, int64_t number, float* out) {
    if (number == 0) {
      fill_zero(out, 4 * statistic_count(p.statistic) * p.head_dim);
      return;
    }
    switch (p.statistic) {
      case BlockStatistic::mean: mean(range, number); break;
      case BlockStatistic::sqrt_mean: {
        mean(range, number);
        const float root = __builtin_sqrtf(static_cast<float>(number));
        for (int64_t v = 0; v < vectors; ++v) total[v] = total[v] * splat(root);
        break;
      }
      case BlockStatistic::min_max: extremes(range); break;
      case BlockStatistic::mean_deviation: deviation(range, number); break;
    }
    write(total, out);
    if (statistic_count(p.statistic) == 2) write(other, out + p.head_dim);
  }
};

template <class T>
void pool_all(const BlockPoolParams& p, const Parallel& parallel) {
  const int64_t size = statistic_count(p.statistic) * p.head_dim;
  int64_t together = 16;
  while (together > 1 && p.batch * p.heads * divide_up(p.blocks, together) < 4 * parallel.threads) {
    together /= 2;
  }
  const int64_t groups = divide_up(p.blocks, together);
  parallel_tasks(parallel, p.batch * p.heads * groups, [&](int64_t task, int64_t) {
    const int64_t row = task / groups, item = row / p.heads, head = row % p.heads;
    Pool<T> pool(p, item, head);
    const int64_t first = task % groups * together;
    for (int64_t block = first; block < first + together && block < p.blocks; ++block) {
      const TokenRange range = block_range(p, item, block);
      const int64_t number = pool.count(range);
      if (head == 0) p.counts[item * p.blocks + block] = static_cast<int32_t>(number);
      pool.run(range, number, p.pooled + (row * p.blocks + block) * size);
    }
  });
}

}  // namespace

void block_pool(const BlockPoolParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() {
    if (p.heads > 0) {
      pool_all<T>(p, parallel);
      return;
    }
    for (int64_t i = 0; i < p.batch * p.blocks; ++i) {
      const TokenRange range = block_range(p, i / p.blocks, i % p.blocks);
      p.counts[i] = static_cast<int32_t>(Pool<T>(p, i / p.blocks, 0).count(range));
    }
  });
}

}  // namespace tokred::TOKRED_ISA
