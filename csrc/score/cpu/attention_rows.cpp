// attention_rows on the CPU: the logits of a few rows as in qk_score, those of more as products of
// panels, then a softmax a row, of one exponential a logit.
#include <algorithm>

#include "attention/cpu/tile.h"
#include "common/cpu/parallel.h"
#include "common/cpu/prefetch.h"
#include "score/cpu/dot.h"
#include "score/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// A last panel of fewer rows is slower than the products of few rows. The sums of both run in
// different orders, so that only sizes of one sequence may decide which a row gets.
constexpr int64_t kFewestPanelRows = 14;

// The rows of a kv head that are computed in panels; the others follow.
int64_t panel_rows(int64_t rows) {
  const int64_t rest = rows % kLanes;
  return rest >= kFewestPanelRows ? rows : rows - rest;
}

// The logits [N] of a row, from key `first` on.
TOKRED_INLINE float* logits_of(const AttentionRowsParams& rows, const Visibility& see,
                               int64_t batch, int64_t kv_head, int64_t row, int64_t first) {
  const AttentionParams& p = rows.attention;
  const int64_t head = kv_head * see.group + row % see.group;
  return rows.rows + ((batch * p.heads_q + head) * p.queries + row / see.group) * p.keys + first;
}

// The logits of a few rows of a kv head with up to kScoreChunk keys.
template <class T>
struct RowLogits {
  const AttentionRowsParams& rows;
  const AttentionParams& p;
  const int64_t batch, kv_head, first;
  const Visibility see;
  const Visible keys;
  alignas(64) float query[kScoreRows * kMaxHeadDim];
  alignas(64) float scores[kScoreRows * kScoreChunk];

  RowLogits(const AttentionRowsParams& params, int64_t b, int64_t h, int64_t first_key,
            int64_t end_key)
      : rows(params), p(params.attention), batch(b), kv_head(h), first(first_key), see(p, b, h),
        keys(
            end_key - first,
            [&](int64_t i) { return see.hides_key(first + i) ? int64_t{-1} : first + i; },
            p.k.stride_token) {}

  float* out(int64_t row) const { return logits_of(rows, see, batch, kv_head, row, first); }

  void run(int64_t first_row) {
    const int64_t stride = divide_up(p.head_dim, kLanes) * kLanes;
    const auto q = query_rows<const T>(p.q, batch, kv_head, see.group);
    for (int64_t row = first_row; row < see.rows; row += kScoreRows) {
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

// The logits of whole panels of rows with a range of keys: blocks of keys stream past. They are
// packed even where they could be read in place: hardware fetches one stream ahead, but not the six
// of a tile.
template <class T>
struct PanelLogits {
  const AttentionRowsParams& rows;
  const AttentionParams& p;
  const int64_t batch, kv_head;
  const Visibility see;
  const int64_t end_row;
  alignas(64) float query[kPanelNumbers];  // [panel][head_dim][16], scaled
  alignas(64) float tile[kTilePanels<float> * kBlock * kLanes];  // [panel][key][16]
  alignas(64) float transposed[kLanes * kBlock];  // [16][key]
  int64_t count, index[kBlock];  // the keys of a block
  alignas(64) float k[kBlock * kMaxHeadDim];  // [key][head_dim]

  PanelLogits(const AttentionRowsParams& params, int64_t b, int64_t h)
      : rows(params), p(params.attention), batch(b), kv_head(h), see(p, b, h),
        end_row(panel_rows(see.rows)) {}

  void run(int64_t first, int64_t end) {
    const int64_t most = p.head_dim <= 128 ? kMaxPanels : kMaxPanels / 2;
    for (int64_t row = 0; row < end_row; row += most * kLanes) {
      const int64_t panels = min(divide_up(end_row - row, kLanes), most);
      load_panels(row, panels);
      for (int64_t key = first; key < end; key += kBlock) {
        score_block(row, panels, key, min(key + kBlock, end), end);
      }
    }
  }

 private:
  void load_panels(int64_t first_row, int64_t panels) {
    const auto q = query_rows<const T>(p.q, batch, kv_head, see.group);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = first_row + panel * kLanes;
      pack_panel<T>([&](int lane) { return row + lane < end_row ? q[row + lane] : nullptr; },
                    p.head_dim, static_cast<float>(p.scale), query + panel * p.head_dim * kLanes);
    }
  }

  // The keys of the next block, up to `last`, are fetched meanwhile.
  void score_block(int64_t first_row, int64_t panels, int64_t first, int64_t end, int64_t last) {
    count = 0;
    for (int64_t key = first; key < end; ++key) {
      index[count] = key;
      count += !see.hides_key(key);
    }
    Coverage coverage[kMaxPanels];
    const bool any = cover_panels(panels, coverage, [&](int64_t panel) {
      const int64_t row = first_row + panel * kLanes;
      return count == 0
                 ? Coverage::none
                 : see.coverage(row, min(row + kLanes, end_row) - 1, index[0], index[count - 1]);
    });
    if (any) {
      for (int64_t i = 0; i < count; ++i) {
        pack_row(key_row<T>(p.k, batch, kv_head, index[i]), p.head_dim, k + i * p.head_dim);
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (coverage[panel] == Coverage::none) hide(first_row + panel * kLanes, first, end);
    }
    const int64_t tiles = divide_up(panels, int64_t{kTilePanels<float>});
    visit_panels<float>(panels, coverage, [&](int64_t panel, int64_t beside) {
      const int64_t line = panel / kTilePanels<float>;
      multiply<Layout::row_step>(
          k, p.head_dim, count, query + panel * p.head_dim * kLanes, p.head_dim * kLanes, beside,
          p.head_dim, [&](int64_t key, int i, f32x16 sum) {
            store(tile + (i * kBlock + key) * kLanes, sum);
            if (i > 0 || end + key >= last) return;
            prefetch_lines(key_row<T>(p.k, batch, kv_head, end + key), p.head_dim, line, tiles);
          });
      for (int64_t i = 0; i < beside; ++i) {
        const int64_t row = first_row + (panel + i) * kLanes;
        float* logits = tile + i * kBlock * kLanes;
        if (coverage[panel + i] == Coverage::some) {
          hide_listed_keys(see, index, count, row, logits);
        }
        write(row, first, end, logits);
      }
    });
  }

  void hide(int64_t first_row, int64_t first, int64_t end) const {
    for (int64_t row = first_row; row < min(first_row + kLanes, end_row); ++row) {
      std::fill_n(logits_of(rows, see, batch, kv_head, row, first), end - first, -kInfinity<float>);
    }
  }

  void write(int64_t first_row, int64_t first, int64_t end, const float* logits) {
    transpose(logits, count, kLanes, transposed);
    if (count < end - first) hide(first_row, first, end);
    for (int64_t lane = 0; lane < min(kLanes, end_row - first_row); ++lane) {
      float* out = logits_of(rows, see, batch, kv_head, first_row + lane, first);
      const float* from = transposed + lane * count;
      if (count == end - first) {
        copy_bytes(out, from, count * static_cast<int64_t>(sizeof(float)));
      } else {
        for (int64_t i = 0; i < count; ++i) out[index[i] - first] = from[i];
      }
    }
  }
};

// The keys of a task. Queries are packed anew for each task, and results do not depend on it.
int64_t task_keys(const AttentionParams& p, bool panels, const Parallel& parallel) {
  if (!panels) return kScoreChunk;
  int64_t keys = 8 * kBlock;
  while (keys > kBlock && p.batch * p.heads_kv * divide_up(p.keys, keys) < 4 * parallel.threads) {
    keys /= 2;
  }
  return keys;
}

// Weights of a row: exp(x - top) of its numbers, summed by chunks, and the largest number `top`.
struct Weights {
  float top, total;
};

// store(i, count, exp(x - top)) of sixteen numbers at a time. The top of a row of which nothing is
// visible is -inf, and its total 0.
template <class Store>
TOKRED_INLINE Weights weigh(const float* row, int64_t count, const Store& keep) {
  f32x16 best = splat(-kInfinity<float>);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) best = max(load(row + i), best);
  float top = max_lane(best);
  for (; i < count; ++i) top = row[i] > top ? row[i] : top;
  if (top == -kInfinity<float>) return {top, 0};
  float total = 0;
  for (int64_t first = 0; first < count; first += kScoreChunk) {
    const int64_t end = min(first + kScoreChunk, count);
    f32x16 part = splat(0.0f);
    for (i = first; i < end; i += kLanes) {
      f32x16 x;
      if (i + kLanes <= end) {
        x = load(row + i);
      } else {
        float lane[kLanes];
        store(lane, splat(-kInfinity<float>));
        copy_bytes(lane, row + i, 4 * (end - i));
        x = load(lane);
      }
      const f32x16 weight = exp(x - splat(top));
      keep(i, end - i, weight);
      part = part + weight;
    }
    total += sum(part);
  }
  return {top, total};
}

// log sum exp of a row; +inf where nothing is visible, so that exp(x - lse) is 0.
float row_lse(const float* row, int64_t count) {
  const Weights w = weigh(row, count, [](int64_t, int64_t, f32x16) {});
  return w.total == 0 ? kInfinity<float> : w.top + std::log(w.total);
}

// Logits to their softmax; zeros where nothing is visible. An exponential each.
void softmax_row(float* row, int64_t count) {
  const Weights w = weigh(row, count, [&](int64_t i, int64_t left, f32x16 weight) {
    store_row(row + i, weight, left);
  });
  if (w.total == 0) return fill_zero(row, 4 * count);
  const f32x16 factor = splat(1 / w.total);
  for (int64_t i = 0; i < count; i += kLanes) {
    store_row(row + i, load_row(row + i, count - i) * factor, count - i);
  }
}

// Logits to quotients of a denominator over a part of the row; those outside of it may overflow.
void divide_row(float* row, int64_t count, float lse) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const f32x16 x = load_row(row + i, count - i) - splat(lse);
    const f32x16 root = exp(min(x, splat(176.0f)) * splat(0.5f));
    store_row(row + i, select_greater(x, splat(88.0f), root * root, exp(x)), count - i);
  }
}

}  // namespace

void attention_rows(const AttentionRowsParams& rows, const Parallel& parallel) {
  const AttentionParams& p = rows.attention;
  const int64_t all_rows = p.queries * (p.heads_q / p.heads_kv), in_panels = panel_rows(all_rows);
  const int64_t keys = task_keys(p, in_panels > 0, parallel), ranges = divide_up(p.keys, keys);
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch * p.heads_kv * ranges, [&](int64_t task, int64_t) {
      const int64_t batch = task / ranges / p.heads_kv, kv_head = task / ranges % p.heads_kv;
      const int64_t first = task % ranges * keys, end = min(first + keys, p.keys);
      if (in_panels > 0) PanelLogits<T>(rows, batch, kv_head).run(first, end);
      if (in_panels == all_rows) return;
      for (int64_t key = first; key < end; key += kScoreChunk) {
        RowLogits<T>(rows, batch, kv_head, key, min(key + kScoreChunk, end)).run(in_panels);
      }
    });
  });
  if (!rows.softmax) return;
  const bool whole = rows.first == 0 && rows.last == p.keys;
  parallel_tasks(parallel, p.batch * p.heads_q * p.queries, [&](int64_t i, int64_t) {
    float* row = rows.rows + i * p.keys;
    if (whole) return softmax_row(row, p.keys);
    divide_row(row, p.keys, row_lse(row + rows.first, rows.last - rows.first));
  });
}

}  // namespace tokred::TOKRED_ISA
