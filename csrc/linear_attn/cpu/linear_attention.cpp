// linear_attention on the CPU, in chunks of 32 rows (Lightning Attention-2, arXiv:2401.04658): the
// rows of a chunk are multiplied with each other, causally, and with one state for all that came
// before. A token takes 24 (D + Dv) multiplications within its chunk and 2 D Dv with the state,
// whatever N is. A single row reads the state once, in place.
#include "attention/cpu/tile.h"
#include "common/cpu/parallel.h"
#include "common/cpu/prefetch.h"
#include "common/cpu/workspace.h"
#include "linear_attn/params.h"

namespace tokred::TOKRED_ISA {
namespace {

inline constexpr int64_t kChunk = 32;

// How the value dimensions of a head are cut into tasks, at most where threads would go idle: each
// split computes the weights of its own. Results do not depend on it.
struct ValueSplits {
  int64_t panels, panels_of_split, count;

  ValueSplits(const LinearAttentionParams& p, int64_t threads)
      : panels(divide_up(p.value_dim, kLanes)) {
    const int64_t heads = max(p.batch * p.heads, int64_t{1});
    panels_of_split = divide_up(panels, min(panels, divide_up(threads, heads)));
    count = divide_up(panels, panels_of_split);
  }
};

// What one worker needs, in numbers; [16] are the lanes of a panel.
template <class Acc>
struct Buffers {
  Acc* keys;      // [kChunk / 16][D][16]
  Acc* decayed;   // [kChunk][D], keys as they enter the state
  Acc* queries;   // [16][D], and
  Acc* left;      // [16][D + kChunk]: decayed queries, weights of the chunk's keys
  Acc* right;     // [panels][D + kChunk][16]: the state, values of the chunk's keys
  Acc* sums;      // [kChunk][panels][16], where there are several key heads
  Acc* pairs;     // [kChunk][kChunk]: w(t_r - t_c), where there is a mask

  void carve(Workspace& w, const LinearAttentionParams& p, int64_t panels) {
    const int64_t steps = p.head_dim + kChunk;
    keys = w.allocate<Acc>(kChunk * p.head_dim);
    decayed = w.allocate<Acc>(kChunk * p.head_dim);
    queries = w.allocate<Acc>(kLanes * p.head_dim);
    left = w.allocate<Acc>(kLanes * steps);
    right = w.allocate<Acc>(panels * steps * kLanes);
    sums = w.allocate<Acc>(p.key_group > 1 ? kChunk * panels * kLanes : 0);
    pairs = w.allocate<Acc>(p.mask ? kChunk * kChunk : 0);
  }
};

template <class Acc>
int64_t buffer_bytes(const LinearAttentionParams& p, int64_t panels) {
  return workspace_bytes([&](Workspace& w) { Buffers<Acc>().carve(w, p, panels); });
}

template <class T>
TOKRED_INLINE T* row_of(const void* data, int64_t stride_batch, int64_t stride_head,
                        int64_t stride_token, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(const_cast<void*>(data)) + batch * stride_batch + head * stride_head +
         row * stride_token;
}

// `to` = factor * a row.
template <class T, class Acc>
TOKRED_INLINE void scale_row(const T* from, int64_t dim, Acc factor, Acc* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load_as(from + d) * splat(factor));
  for (; d < dim; ++d) to[d] = to_float(from[d]) * factor;
}

// The rows of the next chunk, fetched a line at a time while the state is updated.
struct ChunkPrefetcher {
  const char *q, *k, *v;
  int64_t q_stride, k_stride, v_stride, rows, key_lines, value_lines;

  [[gnu::always_inline]] void prefetch(int64_t row, int64_t line) const {
    if (row >= rows) return;
    if (line < key_lines) {
      prefetch_line(q + row * q_stride + 64 * line);
      prefetch_line(k + row * k_stride + 64 * line);
    }
    if (line < value_lines) prefetch_line(v + row * v_stride + 64 * line);
  }
};

// A split of the value dimensions of one head.
template <class T>
struct Head {
  using Acc = Accumulator<T>;
  const LinearAttentionParams& p;
  const int64_t batch, head, first_panel, panels, steps;
  Buffers<Acc> b;
  Acc weight[kChunk + 1];              // w(n)
  alignas(64) Acc ages[2 * kChunk];    // w(kChunk - 1 - i), then zeros: what is yet to come
  int64_t clock[kChunk];               // t of the chunk's rows, and
  int64_t total;                       // T, both counted from the chunk's first row
  bool visible[kChunk];
  bool finite;                         // the chunk's values

  Head(const LinearAttentionParams& params, int64_t batch_index, int64_t head_index, int64_t first,
       int64_t count, void* memory)
      : p(params), batch(batch_index), head(head_index), first_panel(first), panels(count),
        steps(p.head_dim + kChunk) {
    Workspace workspace(memory);
    b.carve(workspace, p, panels);
    const auto rate = static_cast<double>(static_cast<const Acc*>(p.decay)[head * p.decay_stride]);
    weight[0] = 1;
    for (int64_t n = 1; n <= kChunk; ++n) {
      weight[n] = static_cast<Acc>(std::exp(-rate * static_cast<double>(n)));
    }
    for (int64_t i = 0; i < kChunk; ++i) {
      ages[i] = weight[kChunk - 1 - i];
      ages[kChunk + i] = 0;
    }
  }

  const T* q_row(int64_t share, int64_t row) const {
    return key_row<T>(p.q, batch, head * p.query_group + share, row);
  }
  T* out_row(int64_t share, int64_t row) const {
    return row_of<T>(p.out, p.out_stride_batch, p.out_stride_head, p.out_stride_token, batch,
                     head * p.query_group + share, row) +
           first_panel * kLanes;
  }
  bool row_is_visible(int64_t row) const {
    return !p.mask || p.mask[batch * p.mask_stride_batch + row * p.mask_stride_token];
  }
  int64_t width() const { return p.value_dim - first_panel * kLanes; }  // of the values from here

  // The numbers of state row d from this split on.
  const Acc* state_row(int64_t d) const {
    return static_cast<const Acc*>(p.state) + batch * p.state_stride_batch +
           head * p.state_stride_head + d * p.state_stride_row +
           first_panel * kLanes * p.state_stride_column;
  }
  Acc* state_out_row(int64_t d) const {
    return static_cast<Acc*>(p.state_out) +
           ((batch * p.heads + head) * p.head_dim + d) * p.value_dim + first_panel * kLanes;
  }
  Acc* right(int64_t panel, int64_t step) const {
    return b.right + (panel * steps + step) * kLanes;
  }

  void run() {
    load_state();
    for (int64_t row = 0; row < p.tokens; row += kChunk) {
      const int64_t count = min(kChunk, p.tokens - row);
      set_clock(row, count);
      for (int64_t share = 0; share < p.key_group; ++share) {
        load_keys(share, row, count);
        for (int64_t query = 0; query < p.query_group; ++query) {
          weigh_and_add(share, query, row, count);
        }
        update_state(share, count, prefetcher(share, row + kChunk));
      }
    }
    store_state();
  }

  void load_state() {
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t d = 0; d < p.head_dim; ++d) {
        Acc* to = right(panel, d);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t column = panel * kLanes + lane;
          to[lane] =
              p.state && column < width() ? state_row(d)[column * p.state_stride_column] : Acc{0};
        }
      }
    }
  }
  void store_state() {
    if (!p.state_out) return;
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t d = 0; d < p.head_dim; ++d) {
        store_row(state_out_row(d) + panel * kLanes, load(right(panel, d)),
                  width() - panel * kLanes);
      }
    }
  }

  void set_clock(int64_t row, int64_t count) {
    total = 0;
    for (int64_t i = 0; i < count; ++i) {
      visible[i] = row_is_visible(row + i);
      clock[i] = total + (!p.reverse && visible[i]);
      total += visible[i];
    }
    if (!p.mask) return;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < kChunk; ++j) {
        b.pairs[i * kChunk + j] = j <= i ? weight[clock[i] - clock[j]] : Acc{0};
      }
    }
  }
  // w(t_row - t_key) for all keys of the chunk, 0 for those that are yet to come.
  const Acc* weights_of(int64_t row) const {
    return p.mask ? b.pairs + row * kChunk : ages + kChunk - 1 - row;
  }

  void load_keys(int64_t share, int64_t row, int64_t count) {
    const int64_t key_head = head * p.key_group + share;
    const auto hidden = [&](int64_t i) { return i >= count || (!p.reverse && !visible[i]); };
    for (int64_t first = 0; first < count; first += kLanes) {
      Acc* rows = b.decayed + first * p.head_dim;
      for (int64_t i = 0; i < kLanes; ++i) {
        Acc* to = rows + i * p.head_dim;
        if (hidden(first + i)) {
          for (int64_t d = 0; d < p.head_dim; ++d) to[d] = 0;
        } else {
          scale_row(key_row<T>(p.k, batch, key_head, row + first + i), p.head_dim,
                    static_cast<Acc>(p.scale_k), to);
        }
      }
      transpose(rows, kLanes, p.head_dim, b.keys + first * p.head_dim);
      for (int64_t i = first; i < min(first + kLanes, count); ++i) {
        Acc* key = b.decayed + i * p.head_dim;
        scale_row(key, p.head_dim, weight[total - clock[i]], key);
      }
    }
    Vec<Acc> wrong = splat(Acc{0});
    for (int64_t i = 0; i < round_up(count, kLanes); ++i) {
      const T* from =
          hidden(i) ? nullptr : key_row<T>(p.v, batch, key_head, row + i) + first_panel * kLanes;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t left = width() - panel * kLanes;
        const Vec<Acc> x = from ? load_row(from + panel * kLanes, left) : splat(Acc{0});
        wrong = wrong + (x - x);
        store(right(panel, p.head_dim + i), x);
      }
    }
    finite = sum(wrong) == 0;
  }

  void load_queries(int64_t query, int64_t row, int64_t first, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = q_row(query, row + first + i);
      scale_row(from, p.head_dim, static_cast<Acc>(p.scale_q), b.queries + i * p.head_dim);
      scale_row(from, p.head_dim, static_cast<Acc>(p.scale_q) * weight[clock[first + i]],
                b.left + i * steps);
    }
  }

  // Sixteen rows at a time: their weights of the keys up to them, then their sums.
  void weigh_and_add(int64_t share, int64_t query, int64_t row, int64_t count) {
    for (int64_t first = 0; first < count; first += kLanes) {
      const int64_t rows = min(int64_t{kLanes}, count - first);
      load_queries(query, row, first, rows);
      weigh(first, rows);
      if (finite) {
        add(share, query, row, first, 0, rows, first + kLanes);
      } else {
        // 0 times an infinity of a later row would be NaN.
        for (int64_t i = 0; i < rows; ++i) {
          add(share, query, row, first, i, 1, first + i + 1);
        }
      }
    }
  }

  void weigh(int64_t first, int64_t rows) {
    const int64_t key_panels = first / kLanes + 1;
    for (int64_t panel = 0; panel < key_panels; panel += kTilePanels<Acc>) {
      multiply<Layout::row_step>(
          b.queries, p.head_dim, rows, b.keys + panel * p.head_dim * kLanes, p.head_dim * kLanes,
          min(int64_t{kTilePanels<Acc>}, key_panels - panel), p.head_dim,
          [&](int64_t i, int tile_panel, Vec<Acc> dot) {
            const int64_t key = (panel + tile_panel) * kLanes;
            const Vec<Acc> age = load(weights_of(first + i) + key);
            store(b.left + i * steps + p.head_dim + key, select_equal(age, Acc{0}, age, dot * age));
          });
    }
  }

  // Of the rows first + begin .. of the chunk, over its first `keys` keys; the first share adds
  // what comes from the state as well.
  void add(int64_t share, int64_t query, int64_t row, int64_t first, int64_t begin, int64_t rows,
           int64_t keys) {
    const int64_t skip = share == 0 ? 0 : p.head_dim;
    for (int64_t panel = 0; panel < panels; panel += kTilePanels<Acc>) {
      multiply<Layout::row_step>(
          b.left + begin * steps + skip, steps, rows, right(panel, skip), steps * kLanes,
          min(int64_t{kTilePanels<Acc>}, panels - panel), p.head_dim + keys - skip,
          [&](int64_t i, int tile_panel, Vec<Acc> sum) {
            const int64_t at = panel + tile_panel, local = first + begin + i;
            if (p.key_group > 1) {
              Acc* sums = b.sums + (local * panels + at) * kLanes;
              if (share > 0) sum = load(sums) + sum;
              if (share + 1 < p.key_group) return store(sums, sum);
            }
            if (p.reverse && !visible[local]) sum = splat(Acc{0});
            store_row(out_row(query, row + local) + at * kLanes, sum, width() - at * kLanes);
          });
    }
  }

  // The rows from `row` on of a share's keys and values, and of the first of its queries.
  ChunkPrefetcher prefetcher(int64_t share, int64_t row) const {
    constexpr int64_t kSize = sizeof(T);
    const int64_t left = min(kChunk, p.tokens - row), key_head = head * p.key_group + share;
    if (left <= 0) return {};
    const T* q = key_row<T>(p.q, batch, head * p.query_group, row);
    const T* k = key_row<T>(p.k, batch, key_head, row);
    const T* v = key_row<T>(p.v, batch, key_head, row) + first_panel * kLanes;
    return {reinterpret_cast<const char*>(q),
            reinterpret_cast<const char*>(k),
            reinterpret_cast<const char*>(v),
            p.q.stride_token * kSize,
            p.k.stride_token * kSize,
            p.v.stride_token * kSize,
            left,
            divide_up(p.head_dim * kSize, 64),
            divide_up(min(width(), panels * kLanes) * kSize, 64)};
  }

  void update_state(int64_t share, int64_t count, const ChunkPrefetcher& next) {
    const int64_t lines = divide_up(p.head_dim, kChunk);
    const Acc factor = share == 0 ? weight[total] : Acc{1};
    for (int64_t panel = 0, tile = 0; panel < panels; panel += kTilePanels<Acc>, ++tile) {
      multiply<Layout::step_row>(b.decayed, p.head_dim, p.head_dim, right(panel, p.head_dim),
                                 steps * kLanes, min(int64_t{kTilePanels<Acc>}, panels - panel),
                                 count, [&](int64_t d, int tile_panel, Vec<Acc> sum) {
                                   Acc* at = right(panel + tile_panel, d);
                                   store(at, fma(load(at), splat(factor), sum));
                                   if (tile_panel > 0) return;
                                   next.prefetch(d % kChunk, d / kChunk + tile * lines);
                                 });
    }
  }

  // One visible row: state_out = w(1) state + k v^T and its products with up to four queries in one
  // pass; the next four read what was written. With one query four panels of a row at a time, whole
  // cache lines side by side.
  void step() {
    for (int64_t panel = 0, count; panel < panels; panel += count) {
      const bool wide = p.query_group == 1 && width() - panel * kLanes >= 4 * kLanes;
      count = wide && panel + 4 <= panels ? 4 : 1;
      for (int64_t first = 0; first < p.query_group; first += 4) {
        const int64_t shares = min(int64_t{4}, p.query_group - first);
        count == 4 ? step_panels<4, 1>(panel, first, 1) : step_panels<1, 4>(panel, first, shares);
      }
    }
  }

  template <int kPanels, int kShares>
  void step_panels(int64_t panel, int64_t first, int64_t shares) {
    const Acc decay = weight[1];
    const T* key = key_row<T>(p.k, batch, head, 0);
    const T* value = key_row<T>(p.v, batch, head, 0) + first_panel * kLanes;
    const auto scale_k = static_cast<Acc>(p.scale_k), scale_q = static_cast<Acc>(p.scale_q);
    const int64_t at = panel * kLanes, left = width() - at;
    Vec<Acc> v[kPanels], sum[kShares][kPanels];
    for (int i = 0; i < kPanels; ++i) {
      v[i] = load_row(value + at + i * kLanes, left - i * kLanes);
      for (int share = 0; share < kShares; ++share) sum[share][i] = splat(Acc{0});
    }
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const Vec<Acc> k = splat(to_float(key[d]) * scale_k);
#pragma GCC unroll 4
      for (int i = 0; i < kPanels; ++i) {
        const int64_t column = at + i * kLanes, columns = left - i * kLanes;
        Vec<Acc> x;
        if (first == 0) {
          x = v[i] * k;
          if (p.state) x = fma(load_row(state_row(d) + column, columns), splat(decay), x);
          store_row(state_out_row(d) + column, x, columns);
        } else {
          x = load_row(state_out_row(d) + column, columns);
        }
#pragma GCC unroll 4
        for (int share = 0; share < kShares; ++share) {
          if (share >= shares) break;
          const Acc q = to_float(q_row(first + share, 0)[d]) * scale_q;
          sum[share][i] = fma(splat(q), x, sum[share][i]);
        }
      }
    }
    for (int64_t share = 0; share < shares; ++share) {
      for (int i = 0; i < kPanels; ++i) {
        store_row(out_row(first + share, 0) + at + i * kLanes, sum[share][i], left - i * kLanes);
      }
    }
  }
};

// Whether step() serves the call: one row, which is visible, forwards.
bool is_step(const LinearAttentionParams& p) {
  return p.tokens == 1 && !p.reverse && !p.mask && p.state_out && p.state_stride_column <= 1;
}

int64_t bytes_of_worker(const LinearAttentionParams& p, int64_t threads) {
  const int64_t panels = ValueSplits(p, threads).panels_of_split;
  return p.dtype == DType::f64 ? buffer_bytes<double>(p, panels) : buffer_bytes<float>(p, panels);
}

}  // namespace

int64_t linear_attention_workspace(const LinearAttentionParams& p, const Parallel& parallel) {
  if (is_step(p)) return 0;
  const int64_t tasks = p.batch * p.heads * ValueSplits(p, parallel.threads).count;
  return min(tasks, parallel.threads) * bytes_of_worker(p, parallel.threads);
}

void linear_attention(const LinearAttentionParams& p, const Parallel& parallel) {
  const ValueSplits splits(p, parallel.threads);
  const int64_t bytes = bytes_of_worker(p, parallel.threads);
  visit_dtype(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch * p.heads * splits.count, [&](int64_t task, int64_t worker) {
      const int64_t flat = task / splits.count;
      const int64_t first = task % splits.count * splits.panels_of_split;
      const int64_t count = min(splits.panels_of_split, splits.panels - first);
      void* memory = static_cast<char*>(p.workspace) + worker * bytes;
      Head<T> head(p, flat / p.heads, flat % p.heads, first, count, memory);
      if (is_step(p)) {
        head.step();
      } else {
        head.run();
      }
    });
  });
}

}  // namespace tokred::TOKRED_ISA
