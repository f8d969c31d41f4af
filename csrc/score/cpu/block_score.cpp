// block_score on the CPU: dot products as in qk_score, with every query an item of its own.
#include "score/cpu/dot.h"
#include "score/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// Every rule in dot products of a row of the query with a row of the block:
// dot       q . k
// bounds    (negative part of q, positive part of q) . (min, max)
// deviation |dq . k| + |q . dk|: two of them
struct RuleProducts {
  int64_t rows;    // a kv head; a mean of dot products is one with the mean query
  int64_t terms, stride;  // of one product, and floats of its packed query
  int64_t count;   // of dot products a score
  bool folded;
  float* packed;   // [item][product][kv head][row][stride], the items being (batch, query)

  RuleProducts(const BlockScoreParams& p, Workspace& workspace)
      : terms(p.rule == BlockRule::bounds ? 2 * p.head_dim : p.head_dim),
        stride(divide_up(terms, kLanes) * kLanes), count(p.rule == BlockRule::deviation ? 2 : 1),
        folded(is_mean(p.reduction) && p.rule == BlockRule::dot) {
    rows = folded ? 1 : p.heads_q / p.heads_kv;
    packed = workspace.allocate<float>(p.batch * p.queries * count * p.heads_kv * rows * stride);
  }
  float* row(const BlockScoreParams& p, int64_t item, int64_t product, int64_t kv_head,
             int64_t r) const {
    return packed + (((item * count + product) * p.heads_kv + kv_head) * rows + r) * stride;
  }
};

// Packs a query, scaled and divided by the count of a mean; with deviations two rows, dq and q,
// which are multiplied with k and dk.
template <class T>
void pack_block_query(const BlockScoreParams& p, const RuleProducts& products, int64_t item,
                      int64_t kv_head, int64_t r) {
  const int64_t group = p.heads_q / p.heads_kv, heads = products.folded ? group : 1;
  const int64_t first = kv_head * group + r;
  float factor = p.scale;
  if (p.reduction == HeadReduction::group_mean) factor /= static_cast<float>(group);
  if (p.reduction == HeadReduction::head_mean) factor /= static_cast<float>(p.heads_q);
  for (int64_t product = 0; product < products.count; ++product) {
    float* row = products.row(p, item, product, kv_head, r);
    for (int64_t i = 0; i < products.stride; ++i) row[i] = 0;
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
  return Visible(
      size, [&](int64_t i) -> int64_t { return !counts || counts[i] > 0 ? first + i : -1; },
      p.pooled.stride_token);
}

template <class T>
struct BlockScorer {
  const BlockScoreParams& p;
  const RuleProducts& products;
  const int64_t item, first;
  const Visible visible;

  int64_t rows() const { return products.rows; }
  float* out(int64_t head, int64_t heads) const {
    const int64_t batch = item / p.queries, query = item % p.queries;
    return p.out + ((batch * heads + head) * p.queries + query) * p.blocks + first;
  }
  void score(int64_t kv_head, int64_t row, int64_t count, float* scores) const {
    const T* pooled = static_cast<const T*>(p.pooled.data) +
                      item / p.queries * p.pooled.stride_batch + kv_head * p.pooled.stride_head;
    const Steps steps = all_steps(products.terms);
    score_rows(products.row(p, item, 0, kv_head, row), count, products.stride, pooled, visible,
               products.terms, steps, scores);
    if (products.count == 1) return;
    alignas(64) float second[kScoreRows * kScoreChunk];
    score_rows(products.row(p, item, 1, kv_head, row), count, products.stride, pooled + p.head_dim,
               visible, products.terms, steps, second);
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
void score_blocks(const BlockScoreParams& p, const RuleProducts& products, Workspace& workspace,
                  const Parallel& parallel) {
  const int64_t items = p.batch * p.queries;
  const Vote votes(workspace, items, p.heads_q, p.blocks);
  const int64_t chunks = divide_up(p.blocks, kScoreChunk);
  const int64_t heads = p.reduction == HeadReduction::head_mean ? 1 : p.heads_kv;
  parallel_tasks(parallel, items * heads * chunks, [&](int64_t task, int64_t) {
    const int64_t chunk = task % chunks, item = task / (chunks * heads);
    const int64_t first = chunk * kScoreChunk;
    const BlockScorer<T> scorer{p, products, item, first, visible_blocks(p, item, first)};
    HeadReducer(scorer, p.heads_q, p.heads_kv)
        .reduce(p.reduction, task / chunks % heads, votes, item, chunk);
  });
  if (p.reduction == HeadReduction::softmax_vote) votes.count_votes(p.out, parallel);
}

}  // namespace

int64_t block_score_workspace(const BlockScoreParams& p, const Parallel&) {
  return workspace_bytes([&](Workspace& workspace) {
    RuleProducts(p, workspace);
    if (p.reduction != HeadReduction::softmax_vote) return;
    Vote(workspace, p.batch * p.queries, p.heads_q, p.blocks);
  });
}

void block_score(const BlockScoreParams& p, const Parallel& parallel) {
  Workspace workspace(p.workspace);
  const RuleProducts products(p, workspace);
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch * p.queries * p.heads_kv * products.rows,
                   [&](int64_t task, int64_t) {
                     const int64_t head = task / products.rows;
                     pack_block_query<T>(p, products, head / p.heads_kv, head % p.heads_kv,
                                         task % products.rows);
                   });
  });
  visit_f32(p.pooled_dtype, [&]<class T>() { score_blocks<T>(p, products, workspace, parallel); });
}

}  // namespace tokred::TOKRED_ISA
