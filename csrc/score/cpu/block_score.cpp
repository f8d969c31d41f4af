// Statistics of blocks of tokens, one pass over the tokens (a second one over each block, still in
// cache, for deviations), and scores of the blocks: dot products as in score/cpu/qk_score.cpp, with every query
// an item of its own.
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "score/cpu/dot.h"
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
      total[v] = splat(__builtin_inff());
      other[v] = splat(-__builtin_inff());
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
  while (together > 1 &&
         p.batch * p.heads * divide_up(p.blocks, together) < 4 * parallel.threads) {
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

// Every rule in dot products of a row of the query with a row of the block:
// dot       q . k
// bounds    (negative part of q, positive part of q) . (min, max)
// deviation |dq . k| + |q . dk|: two of them
struct RulePlan {
  int64_t rows;    // a kv head; a mean of dot products is one with the mean query
  int64_t terms, stride;  // of one product, and floats of its packed query
  int64_t products;
  bool folded;

  explicit RulePlan(const BlockScoreParams& p)
      : terms(p.rule == BlockRule::bounds ? 2 * p.head_dim : p.head_dim),
        stride(divide_up(terms, kLanes) * kLanes),
        products(p.rule == BlockRule::deviation ? 2 : 1),
        folded(is_mean(p.reduction) && p.rule == BlockRule::dot) {
    rows = folded ? 1 : p.heads_q / p.heads_kv;
  }
  // [item][product][kv head][row][stride], the items being (batch, query).
  int64_t bytes(const BlockScoreParams& p) const {
    return aligned(4 * p.batch * p.queries * products * p.heads_kv * rows * stride) + kAlign;
  }
  float* row(const BlockScoreParams& p, int64_t item, int64_t product, int64_t kv_head,
             int64_t r) const {
    auto* memory = reinterpret_cast<float*>(aligned(p.workspace));
    return memory + (((item * products + product) * p.heads_kv + kv_head) * rows + r) * stride;
  }
};

// Scaled, with the divisor of a mean. Two rows with deviations, crosswise: dq and q.
template <class T>
void pack_block_query(const BlockScoreParams& p, const RulePlan& plan, int64_t item,
                      int64_t kv_head, int64_t r) {
  const int64_t group = p.heads_q / p.heads_kv, heads = plan.folded ? group : 1;
  const int64_t first = kv_head * group + r;
  float factor = p.scale;
  if (p.reduction == HeadReduction::group_mean) factor /= static_cast<float>(group);
  if (p.reduction == HeadReduction::head_mean) factor /= static_cast<float>(p.heads_q);
  for (int64_t product = 0; product < plan.products; ++product) {
    float* row = plan.row(p, item, product, kv_head, r);
    for (int64_t i = 0; i < plan.stride; ++i) row[i] = 0;
    for (int64_t head = first; head < first + heads; ++head) {
      const T* q = static_cast<const T*>(p.q.data) + item / p.queries * p.q.stride_batch +
                   head * p.q.stride_head + item % p.queries * p.q.stride_token;
      if (p.rule == BlockRule::deviation) q += (1 - product) * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; ++d) {
        const float x = to_float(q[d]) * factor;
        if (p.rule != BlockRule::bounds) {
          row[d] += x;
        } else {
          const bool negative = to_float(q[d]) < 0;
          row[d] = negative ? x : 0;
          row[p.head_dim + d] = negative ? 0 : x;
        }
      }
    }
  }
}

Visible visible_blocks(const BlockScoreParams& p, int64_t item, int64_t first) {
  const int64_t size = p.blocks - first < kScoreChunk ? p.blocks - first : kScoreChunk;
  const int32_t* counts =
      p.counts ? p.counts + item / p.queries * p.counts_stride_batch + first : nullptr;
  return Visible(size, [&](int64_t i) -> int64_t {
    return !counts || counts[i] > 0 ? first + i : -1;
  }, p.pooled.stride_token);
}

template <class T>
struct BlockScorer {
  const BlockScoreParams& p;
  const RulePlan& plan;
  const int64_t item, first;
  const Visible visible;

  int64_t rows() const { return plan.rows; }
  float* out(int64_t head, int64_t heads) const {
    const int64_t batch = item / p.queries, query = item % p.queries;
    return p.out + ((batch * heads + head) * p.queries + query) * p.blocks + first;
  }
  void score(int64_t kv_head, int64_t row, int64_t count, float* scores) const {
    const T* pooled = static_cast<const T*>(p.pooled.data) +
                      item / p.queries * p.pooled.stride_batch + kv_head * p.pooled.stride_head;
    const Steps steps = all_steps(plan.terms);
    score_rows(plan.row(p, item, 0, kv_head, row), count, plan.stride, pooled, visible, plan.terms,
               steps, scores);
    if (plan.products == 1) return;
    alignas(64) float second[kScoreRows * kScoreChunk];
    score_rows(plan.row(p, item, 1, kv_head, row), count, plan.stride, pooled + p.head_dim,
               visible, plan.terms, steps, second);
    const float sign = p.scale < 0 ? -1.0f : 1.0f;
    for (int64_t r = 0; r < count; ++r) {
      float* to = scores + r * kScoreChunk;
      for (int64_t i = 0; i < visible.count; ++i) {
        to[i] = sign * (__builtin_fabsf(to[i]) + __builtin_fabsf(second[r * kScoreChunk + i]));
      }
    }
  }
};

template <class T>
void score_blocks(const BlockScoreParams& p, const RulePlan& plan, const Parallel& parallel) {
  const int64_t items = p.batch * p.queries;
  const Vote votes(static_cast<char*>(p.workspace) + plan.bytes(p), items, p.heads_q, p.blocks);
  const int64_t chunks = divide_up(p.blocks, kScoreChunk);
  const int64_t heads = p.reduction == HeadReduction::head_mean ? 1 : p.heads_kv;
  parallel_tasks(parallel, items * heads * chunks, [&](int64_t task, int64_t) {
    const int64_t chunk = task % chunks, item = task / (chunks * heads);
    const int64_t first = chunk * kScoreChunk;
    const BlockScorer<T> scorer{p, plan, item, first, visible_blocks(p, item, first)};
    HeadReducer(scorer, p.heads_q, p.heads_kv)
        .reduce(p.reduction, task / chunks % heads, votes, item, chunk);
  });
  if (p.reduction == HeadReduction::softmax_vote) votes.count_votes(p.out, parallel);
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

int64_t block_score_workspace(const BlockScoreParams& p, const Parallel&) {
  const bool vote = p.reduction == HeadReduction::softmax_vote;
  return RulePlan(p).bytes(p) + (vote ? Vote::bytes(p.batch * p.queries, p.heads_q, p.blocks) : 0);
}

void block_score(const BlockScoreParams& p, const Parallel& parallel) {
  const RulePlan plan(p);
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch * p.queries * p.heads_kv * plan.rows,
                   [&](int64_t task, int64_t) {
                     const int64_t head = task / plan.rows;
                     pack_block_query<T>(p, plan, head / p.heads_kv, head % p.heads_kv,
                                         task % plan.rows);
                   });
  });
  visit_f32(p.pooled_dtype, [&]<class T>() { score_blocks<T>(p, plan, parallel); });
}

}  // namespace tokred::TOKRED_ISA
