// attention_rows on the CPU: the logits of a few queries as in qk_score, then a softmax a row.
#include "attention/cpu/tile.h"
#include "common/cpu/parallel.h"
#include "score/cpu/dot.h"
#include "score/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// The logits of all (query, head) rows of a kv head with one chunk of keys.
template <class T>
struct RowLogits {
  const AttentionRowsParams& rows;
  const AttentionParams& p;
  const int64_t batch, kv_head, first;
  const Visibility see;
  const Visible keys;
  alignas(64) float query[kScoreRows * kMaxHeadDim];
  alignas(64) float scores[kScoreRows * kScoreChunk];

  RowLogits(const AttentionRowsParams& params, int64_t b, int64_t h, int64_t first_key)
      : rows(params), p(params.attention), batch(b), kv_head(h), first(first_key), see(p, b, h),
        keys(
            min(p.keys - first, kScoreChunk),
            [&](int64_t i) { return see.hides_key(first + i) ? int64_t{-1} : first + i; },
            p.k.stride_token) {}

  float* out(int64_t row) const {
    const int64_t head = kv_head * see.group + row % see.group;
    return rows.rows + ((batch * p.heads_q + head) * p.queries + row / see.group) * p.keys + first;
  }

  void run() {
    const int64_t stride = divide_up(p.head_dim, kLanes) * kLanes;
    const auto q = query_rows<const T>(p.q, batch, kv_head, see.group);
    for (int64_t row = 0; row < see.rows; row += kScoreRows) {
      const int64_t count = min(see.rows - row, kScoreRows);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t d = 0; d < p.head_dim; d += kLanes) {
          store(query + r * stride + d,
                load_row(q[row + r] + d, p.head_dim - d) * splat(static_cast<float>(p.scale)));
        }
      }
      score_rows(query, count, stride, key_row<T>(p.k, batch, kv_head, 0), keys, p.head_dim,
                 all_steps(p.head_dim), scores);
      for (int64_t r = 0; r < count; ++r) {
        keys.spread(scores + r * kScoreChunk, out(row + r));
        hide(row + r, out(row + r));
      }
    }
  }

  void hide(int64_t row, float* logits) const {
    const int64_t limit = see.limit(row) - first;
    if (p.key_bias) {
      for (int64_t i = 0; i < keys.size; ++i) {
        logits[i] += key_bias<float>(p, batch, kv_head, first + i);
      }
    }
    if (see.masks_pairs()) {
      const bool* visible = see.row_mask(row, first);
      for (int64_t i = 0; i < keys.size; ++i) {
        logits[i] = visible[i * see.stride_key] ? logits[i] : -kInfinity<float>;
      }
    }
    for (int64_t i = max(limit + 1, 0); i < keys.size; ++i) logits[i] = -kInfinity<float>;
  }
};

// log sum exp of a row, by chunks; +inf where nothing is visible, so that exp(x - lse) is 0.
float row_lse(const float* row, int64_t count) {
  f32x16 best = splat(-kInfinity<float>);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) best = max(load(row + i), best);
  float top = max_lane(best);
  for (; i < count; ++i) top = row[i] > top ? row[i] : top;
  if (top == -kInfinity<float>) return kInfinity<float>;
  float total = 0;
  for (int64_t first = 0; first < count; first += kScoreChunk) {
    const int64_t end = min(first + kScoreChunk, count);
    f32x16 part = splat(0.0f);
    for (i = first; i + kLanes <= end; i += kLanes) part = part + exp(load(row + i) - splat(top));
    if (i < end) {
      float lane[kLanes];
      store(lane, splat(-kInfinity<float>));
      copy_bytes(lane, row + i, 4 * (end - i));
      part = part + exp(load(lane) - splat(top));
    }
    total += sum(part);
  }
  return top + std::log(total);
}

// Logits to quotients; those outside the range of the denominator may overflow.
void divide_row(float* row, int64_t count, float lse, bool may_overflow) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const f32x16 x = load_row(row + i, count - i) - splat(lse);
    f32x16 quotient = exp(x);
    if (may_overflow) {
      const f32x16 root = exp(min(x, splat(176.0f)) * splat(0.5f));
      quotient = select_greater(x, splat(88.0f), root * root, quotient);
    }
    store_row(row + i, quotient, count - i);
  }
}

}  // namespace

void attention_rows(const AttentionRowsParams& rows, const Parallel& parallel) {
  const AttentionParams& p = rows.attention;
  const int64_t chunks = divide_up(p.keys, kScoreChunk);
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch * p.heads_kv * chunks, [&](int64_t task, int64_t) {
      const int64_t head = task / chunks, first = task % chunks * kScoreChunk;
      RowLogits<T>(rows, head / p.heads_kv, head % p.heads_kv, first).run();
    });
  });
  if (!rows.softmax) return;
  const bool whole = rows.first == 0 && rows.last == p.keys;
  parallel_tasks(parallel, p.batch * p.heads_q * p.queries, [&](int64_t i, int64_t) {
    float* row = rows.rows + i * p.keys;
    divide_row(row, p.keys, row_lse(row + rows.first, rows.last - rows.first), !whole);
  });
}

}  // namespace tokred::TOKRED_ISA
