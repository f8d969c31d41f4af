// Scores of keys or blocks of many heads: the query rows that are scored, how scored rows are
// reduced to rows of the result, and the softmax vote of many heads over chunks of their columns.
#pragma once

#include "attention/score_params.h"
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "common/cpu/sizes.h"
#include "common/cpu/vexp.h"
#include "common/cpu/workspace.h"

namespace tokred::TOKRED_ISA {

// Columns that are scored, and summed in a vote, at a time: part of the order of summation.
inline constexpr int64_t kScoreChunk = 512;
inline constexpr int64_t kScoreRows = 4;  // rows scored together

TOKRED_INLINE bool is_mean(HeadReduction reduction) {
  return reduction == HeadReduction::group_mean || reduction == HeadReduction::head_mean;
}

// The columns of a chunk that are scored.
struct Visible {
  int64_t size, count = 0;
  int64_t offset[kScoreChunk];  // in elements; behind the last it is repeated up to whole panels
  int32_t position[kScoreChunk];  // in the chunk

  // row(i) is the number of the row that column i stands for, or -1.
  template <class Row>
  Visible(int64_t columns, const Row& row, int64_t stride) : size(columns) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = row(i);
      if (at < 0) continue;
      offset[count] = at * stride;
      position[count++] = static_cast<int32_t>(i);
    }
    for (int64_t i = count; i % kLanes != 0; ++i) offset[i] = offset[count - 1];
  }

  // The whole chunk, -inf where nothing is visible.
  void spread(const float* from, float* to) const {
    if (count == size) {
      copy_bytes(to, from, 4 * size);
      return;
    }
    for (int64_t i = 0; i < size; ++i) to[i] = -kInfinity<float>;
    for (int64_t i = 0; i < count; ++i) to[position[i]] = from[i];
  }
};

// Softmax over [heads][columns] logits a batch entry, summed over the heads. The logits come chunk
// by chunk. A chunk is kept as exponentials relative to its largest logit; once the lse is known,
// one factor a chunk makes softmax weights of them.
struct Vote {
  float* exponentials;  // [items][heads][columns], exp(logit - top)
  float* top;  // [items][heads][chunks], then the factors exp(top - lse)
  float* total;  // [items][heads][chunks]
  int64_t items, heads, columns, chunks;

  Vote(Workspace& workspace, int64_t items_, int64_t heads_, int64_t columns_)
      : items(items_), heads(heads_), columns(columns_), chunks(divide_up(columns_, kScoreChunk)) {
    exponentials = workspace.allocate<float>(items * heads * columns);
    top = workspace.allocate<float>(items * heads * chunks);
    total = workspace.allocate<float>(items * heads * chunks);
  }

  // row holds a whole chunk, -inf where there is no column.
  void put(int64_t item, int64_t head, int64_t chunk, const float* row, int64_t count) const {
    const int64_t at = item * heads + head;
    f32x16 best = splat(-kInfinity<float>);
    for (int64_t i = 0; i < count; i += kLanes) best = max(load(row + i), best);
    const float max_score = max_lane(best);
    const f32x16 base = splat(max_score > -kInfinity<float> ? max_score : 0.0f);
    float* out = exponentials + at * columns + chunk * kScoreChunk;
    f32x16 added = splat(0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
      const f32x16 weight = exp(load(row + i) - base);
      added = added + weight;
      store_row(out + i, weight, count - i);
    }
    top[at * chunks + chunk] = max_score;
    total[at * chunks + chunk] = sum(added);
  }

  // A head that saw nothing has a log-sum-exp of +inf, and so factors of 0.
  void finish_head(int64_t at) const {
    float max_score = -kInfinity<float>;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float x = top[at * chunks + chunk];
      max_score = x > max_score ? x : max_score;
    }
    float sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float x = top[at * chunks + chunk];
      if (x == -kInfinity<float> && total[at * chunks + chunk] == 0) continue;
      sum += total[at * chunks + chunk] * std::exp(x - max_score);
    }
    const float lse = sum == 0 ? kInfinity<float> : max_score + std::log(sum);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      top[at * chunks + chunk] = std::exp(top[at * chunks + chunk] - lse);
    }
  }

  // out is [items][columns].
  void count_votes(float* out, const Parallel& parallel) const {
    parallel_tasks(parallel, items * heads, [&](int64_t at, int64_t) { finish_head(at); });
    parallel_tasks(parallel, items * chunks, [&](int64_t task, int64_t) {
      const int64_t item = task / chunks, chunk = task % chunks, first = chunk * kScoreChunk;
      const int64_t size = columns - first < kScoreChunk ? columns - first : kScoreChunk;
      alignas(64) float votes[kScoreChunk] = {};
      for (int64_t at = item * heads; at < (item + 1) * heads; ++at) {
        const f32x16 factor = splat(top[at * chunks + chunk]);
        const float* row = exponentials + at * columns + first;
        for (int64_t i = 0; i < size; i += kLanes) {
          store(votes + i, fma(load_row(row + i, size - i), factor, load(votes + i)));
        }
      }
      copy_bytes(out + item * columns + first, votes, 4 * size);
    });
  }
};

// Makes a chunk of the result from the scores of its heads. Scorer has `visible`, the number of
// rows() to score a kv head, score(kv_head, row, count, scores [count][kScoreChunk]), and
// out(head, heads), the chunk in row `head` of a result with `heads` rows.
template <class Scorer>
struct HeadReducer {
  const Scorer& scorer;
  const Visible& visible;
  int64_t heads_q, heads_kv;
  alignas(64) float scores[kScoreRows * kScoreChunk];
  alignas(64) float total[kScoreChunk];

  HeadReducer(const Scorer& s, int64_t query_heads, int64_t key_heads)
      : scorer(s), visible(s.visible), heads_q(query_heads), heads_kv(key_heads) {}

  void reduce(HeadReduction reduction, int64_t kv_head, const Vote& votes, int64_t item,
              int64_t chunk) {
    switch (reduction) {
      case HeadReduction::none: keep(kv_head); break;
      case HeadReduction::group_mean:
        add(kv_head, kv_head + 1, scorer.out(kv_head, heads_kv));
        break;
      case HeadReduction::group_max: group_max(kv_head); break;
      case HeadReduction::head_mean: add(0, heads_kv, scorer.out(0, 1)); break;
      case HeadReduction::softmax_vote: vote(kv_head, votes, item, chunk); break;
    }
  }

 private:
  template <class Visit>
  void each_row(int64_t kv_head, const Visit& visit) {
    for (int64_t row = 0; row < scorer.rows(); row += kScoreRows) {
      const int64_t count = scorer.rows() - row < kScoreRows ? scorer.rows() - row : kScoreRows;
      scorer.score(kv_head, row, count, scores);
      for (int64_t i = 0; i < count; ++i) visit(row + i, scores + i * kScoreChunk);
    }
  }
  void start(float x) {
    for (int64_t i = 0; i < kScoreChunk; i += kLanes) store(total + i, splat(x));
  }
  void keep(int64_t kv_head) {
    each_row(kv_head, [&](int64_t row, const float* x) {
      visible.spread(x, scorer.out(kv_head * scorer.rows() + row, heads_q));
    });
  }
  void vote(int64_t kv_head, const Vote& votes, int64_t item, int64_t chunk) {
    start(-kInfinity<float>);
    each_row(kv_head, [&](int64_t row, const float* x) {
      visible.spread(x, total);
      votes.put(item, kv_head * scorer.rows() + row, chunk, total, visible.size);
    });
  }
  // NaN stays.
  void group_max(int64_t kv_head) {
    start(-kInfinity<float>);
    each_row(kv_head, [&](int64_t, const float* x) {
      for (int64_t i = 0; i < visible.count; ++i) {
        const bool stays = total[i] >= x[i] || total[i] != total[i];
        total[i] = stays ? total[i] : x[i];
      }
    });
    visible.spread(total, scorer.out(kv_head, heads_kv));
  }
  // A sum over heads; of means the queries have been divided by the number of heads already.
  void add(int64_t first_head, int64_t end_head, float* out) {
    start(0.0f);
    for (int64_t head = first_head; head < end_head; ++head) {
      each_row(head, [&](int64_t, const float* x) {
        for (int64_t i = 0; i < visible.count; ++i) total[i] += x[i];
      });
    }
    visible.spread(total, out);
  }
};

// ---- Queries ------------------------------------------------------------------------------------

// The query heads as rows to score; a mean of scores is the score of the mean query.
struct QueryRows {
  int64_t heads;  // of a row
  int64_t rows;  // a kv head
  int64_t stride;  // floats of a row, a multiple of 16
  float* packed;  // [batch][kv head][row][stride]

  QueryRows(const QkScoreParams& p, Workspace& workspace)
      : heads(is_mean(p.reduction) ? p.heads_q / p.heads_kv : 1),
        rows(p.heads_q / p.heads_kv / heads), stride(round_up(p.head_dim, kLanes)),
        packed(workspace.allocate<float>(p.batch * p.heads_kv * rows * stride)) {}
  float* row(const QkScoreParams& p, int64_t item, int64_t kv_head, int64_t r) const {
    return packed + ((item * p.heads_kv + kv_head) * rows + r) * stride;
  }
};

// Calls visit(d) for the dimensions that `dims` lists for a head.
template <class Visit>
TOKRED_INLINE void each_dim(const QkScoreParams& p, int64_t head, const Visit& visit) {
  for (int64_t i = 0; i < p.num_dims; ++i) {
    const int32_t d = p.dims[head * p.num_dims + i];
    if (d >= 0 && d < p.head_dim) visit(d);
  }
}

// The mean over the queries, and over the heads of the result, times the scale; a head counts only
// in the dimensions that `dims` lists for it.
template <class T>
void pack_query(const QkScoreParams& p, const QueryRows& query_rows, int64_t item, int64_t kv_head,
                int64_t r) {
  const int64_t first = (kv_head * query_rows.rows + r) * query_rows.heads;
  int64_t mean_over = p.queries;
  if (p.reduction == HeadReduction::group_mean) mean_over *= query_rows.heads;
  if (p.reduction == HeadReduction::head_mean) mean_over *= p.heads_q;
  float* row = query_rows.row(p, item, kv_head, r);
  for (int64_t d = 0; d < query_rows.stride; ++d) row[d] = 0;
  for (int64_t head = first; head < first + query_rows.heads; ++head) {
    const T* q = static_cast<const T*>(p.q.data) + item * p.q.stride_batch + head * p.q.stride_head;
    alignas(64) float total[kMaxWideDim];
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      f32x16 part = splat(0.0f);
      for (int64_t i = 0; i < p.queries; ++i) {
        part = part + load_row(q + i * p.q.stride_token + d, p.head_dim - d);
      }
      store(total + d, part * splat(p.scale) / splat(static_cast<float>(mean_over)));
    }
    if (p.dims) {
      each_dim(p, head, [&](int32_t d) { row[d] += total[d]; });
    } else {
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] += total[d];
    }
  }
}

}  // namespace tokred::TOKRED_ISA
