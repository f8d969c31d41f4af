// qk_score on the CPU, bound by memory: a task scores a chunk of keys for all query heads of a kv
// head, so each key is read once. bf16 [8, 131072, 128] is 268 MB, 10 ms at 28 GB/s, beside about
// 130 instructions a key for four heads (6 ms on two cores).
#include "score/cpu/dot.h"
#include "score/params.h"

namespace tokred::TOKRED_ISA {
namespace {

Visible visible_keys(const QkScoreParams& p, int64_t item, int64_t first) {
  const int64_t size = p.keys - first < kScoreChunk ? p.keys - first : kScoreChunk;
  const int64_t length = p.lengths ? p.lengths[item * p.lengths_stride] : p.keys;
  return Visible(
      size,
      [&](int64_t i) -> int64_t {
        const int64_t key = first + i;
        if (key >= length) return -1;
        if (p.mask && !p.mask[item * p.mask_stride_batch + key * p.mask_stride_token]) return -1;
        const int64_t slot = p.slots ? p.slots[item * p.slots_stride_batch + key] : key;
        return slot >= 0 && slot < p.stored_keys ? slot : -1;
      },
      p.k.stride_token);
}

// The dimensions that `dims` lists for up to four query rows: each row's own, and their union.
struct Subset {
  float listed[kScoreRows][kMaxHeadDim];  // 1 or 0
  bool used[kMaxHeadDim / kLanes];

  Subset(const QkScoreParams& p, const QueryRows& query_rows, int64_t first_row, int64_t rows) {
    for (bool& x : used) x = !p.dims;
    if (!p.dims) return;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = 0; d < query_rows.stride; ++d) listed[row][d] = 0;
      const int64_t first = (first_row + row) * query_rows.heads;
      for (int64_t head = first; head < first + query_rows.heads; ++head) {
        each_dim(p, head, [&](int32_t d) {
          listed[row][d] = 1;
          used[d / kLanes] = true;
        });
      }
    }
  }
  Steps steps(int64_t dim) const {
    return Steps(dim, [&](int64_t group) { return used[group]; });
  }
};

// The score of one key, as score_rows gives it where the dimensions left out are finite.
template <class T>
float score_listed(const float* query, const float* listed, const T* key, int64_t dim,
                   const Steps& steps) {
  f32x16 total = splat(0.0f);
  const auto step = [&](int64_t d) {
    const f32x16 x = load_row(key + d, dim - d);
    const f32x16 inside = select_greater(load(listed + d), splat(0.0f), x, splat(0.0f));
    total = fma(inside, load(query + d), total);
  };
  for (int64_t i = 0; i < steps.count; ++i) step(steps.at[i]);
  if (steps.rest > 0) step(dim - steps.rest);
  return sum(total);
}

// Whether all are finite; a sum of differences is NaN where one is not.
bool all_finite(const float* x, int64_t count) {
  f32x16 difference = splat(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const f32x16 some = load_row(x + i, count - i);
    difference = difference + (some - some);
  }
  return sum(difference) == 0;
}

template <class T>
struct KeyScorer {
  const QkScoreParams& p;
  const QueryRows& query_rows;
  const int64_t item, first;
  const Visible visible;

  int64_t rows() const { return query_rows.rows; }
  float* out(int64_t head, int64_t heads) const {
    return p.out + (item * heads + head) * p.keys + first;
  }
  void score(int64_t kv_head, int64_t row, int64_t count, float* scores) const {
    const T* keys = static_cast<const T*>(p.k.data) + kv_head * p.k.stride_head +
                    (p.slots ? 0 : item * p.k.stride_batch);
    const float* query = query_rows.row(p, item, kv_head, row);
    const Subset subset(p, query_rows, kv_head * query_rows.rows + row, count);
    const Steps steps = subset.steps(p.head_dim);
    score_rows(query, count, query_rows.stride, keys, visible, p.head_dim, steps, scores);
    if (!p.dims) return;
    // In a dimension that only another row lists the query is 0, and 0 times infinity is NaN: such
    // scores are computed again, over the row's own dimensions.
    for (int64_t r = 0; r < count; ++r) {
      float* x = scores + r * kScoreChunk;
      if (all_finite(x, visible.count)) continue;
      for (int64_t i = 0; i < visible.count; ++i) {
        if (x[i] == x[i]) continue;
        x[i] = score_listed(query + r * query_rows.stride, subset.listed[r],
                            keys + visible.offset[i], p.head_dim, steps);
      }
    }
  }
};

template <class T>
void score_all(const QkScoreParams& p, const Parallel& parallel) {
  Workspace workspace(p.workspace);
  const QueryRows query_rows(p, workspace);
  parallel_tasks(parallel, p.batch * p.heads_kv * query_rows.rows, [&](int64_t task, int64_t) {
    const int64_t head = task / query_rows.rows;
    pack_query<T>(p, query_rows, head / p.heads_kv, head % p.heads_kv, task % query_rows.rows);
  });
  const Vote votes(workspace, p.batch, p.heads_q, p.keys);
  const int64_t chunks = divide_up(p.keys, kScoreChunk);
  const int64_t heads = p.reduction == HeadReduction::head_mean ? 1 : p.heads_kv;
  parallel_tasks(parallel, p.batch * heads * chunks, [&](int64_t task, int64_t) {
    const int64_t chunk = task % chunks, item = task / (chunks * heads);
    const int64_t first = chunk * kScoreChunk;
    const KeyScorer<T> scorer{p, query_rows, item, first, visible_keys(p, item, first)};
    HeadReducer(scorer, p.heads_q, p.heads_kv)
        .reduce(p.reduction, task / chunks % heads, votes, item, chunk);
  });
  if (p.reduction == HeadReduction::softmax_vote) votes.count_votes(p.out, parallel);
}

}  // namespace

int64_t qk_score_workspace(const QkScoreParams& p, const Parallel&) {
  return workspace_bytes([&](Workspace& workspace) {
    QueryRows(p, workspace);
    if (p.reduction == HeadReduction::softmax_vote) Vote(workspace, p.batch, p.heads_q, p.keys);
  });
}

void qk_score(const QkScoreParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { score_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
