// attention_columns on the CPU: sixteen keys are the lanes of a panel and blocks of queries stream
// past, so that every statistic of a column stays in its lane and no matrix is stored: per query
// and panel 2 D FMA instructions of eight lanes, about 40 for the exponential and a few for the
// statistic.
#include "attention/cpu/tile.h"
#include "common/cpu/parallel.h"
#include "score/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// Up to eight panels of keys of a kv head; the query heads pass one after another.
struct ColumnTask {
  static constexpr int64_t kWeights = kBlock * kLanes;

  const AttentionColumnsParams& columns;
  const AttentionParams& p;
  const int64_t batch, kv_head, first_key, panels;
  alignas(64) float key[kPanelNumbers];  // [panel][head_dim][16], scaled
  alignas(64) float bias[kMaxPanels * kLanes];
  alignas(64) float mean[kMaxPanels * kLanes];   // or the sum, or the maximum
  alignas(64) float square[kMaxPanels * kLanes]; // sum of the squared distances from the mean
  Coverage coverage[kMaxPanels];                       // how much of a panel a block sees
  int64_t seen[kMaxPanels];                      // queries in `mean`; the others count as 0
  alignas(64) float weights[kTilePanels<float> * kWeights];
  int64_t block_first, block_count;
  alignas(64) float lse[kBlock];
  alignas(64) float factor[kBlock];
  alignas(64) float q[kBlock * kMaxHeadDim];

  ColumnTask(const AttentionColumnsParams& params, int64_t b, int64_t h, int64_t first,
             int64_t max_panels)
      : columns(params), p(params.attention), batch(b), kv_head(h), first_key(first),
        panels(min(max_panels, divide_up(p.keys - first, kLanes))) {}

  int64_t panel_key(int64_t panel) const { return first_key + panel * kLanes; }
  int64_t last_key(int64_t panel) const { return min(panel_key(panel) + kLanes, p.keys) - 1; }

  template <class T>
  void run() {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = panel_key(panel);
      pack_panel<T>(
          [&](int lane) {
            return first + lane < p.keys ? key_row<T>(p.k, batch, kv_head, first + lane) : nullptr;
          },
          p.head_dim, static_cast<float>(p.scale), key + panel * p.head_dim * kLanes);
    }
    const int64_t group = p.heads_q / p.heads_kv;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) run_head<T>(head);
  }

  template <class T>
  void run_head(int64_t head) {
    const Visibility see(p, batch, head, 1);
    const float start = columns.reduction == ColumnReduction::max ? -kInfinity<float> : 0.0f;
    for (int64_t panel = 0; panel < panels; ++panel) {
      store(mean + panel * kLanes, splat(start));
      store(square + panel * kLanes, splat(0.0f));
      seen[panel] = 0;
    }
    for (int64_t i = 0; i < panels * kLanes; ++i) {
      const int64_t at = first_key + i;
      const bool hidden = at >= p.keys || see.hides_key(at);
      bias[i] = hidden ? -kInfinity<float> : key_bias<float>(p, batch, kv_head, at);
    }
    for (block_first = 0; block_first < p.queries; block_first += kBlock) {
      block_count = min(kBlock, p.queries - block_first);
      const int64_t last = block_first + block_count - 1;
      const bool any = cover_panels(panels, coverage, [&](int64_t panel) {
        return see.coverage(block_first, last, panel_key(panel), last_key(panel));
      });
      if (!any) continue;
      load_block<T>(head);
      visit_panels<float>(panels, coverage, [&](int64_t panel, int64_t count) {
        weigh(see, panel, count);
        for (int64_t i = 0; i < count; ++i) add(panel + i, weights + i * kWeights);
      });
    }
    for (int64_t panel = 0; panel < panels; ++panel) finish(head, panel);
  }

  // A query that sees nothing gets lse +inf, hence weights 0.
  template <class T>
  void load_block(int64_t head) {
    const int64_t first = (batch * p.heads_q + head) * p.queries + block_first;
    const float* weight = columns.weight;
    if (weight) weight += batch * columns.weight_stride_batch + head * columns.weight_stride_head;
    for (int64_t i = 0; i < block_count; ++i) {
      const float log_sum = static_cast<const float*>(p.lse)[first + i];
      lse[i] = log_sum == -kInfinity<float> ? kInfinity<float> : log_sum;
      const int64_t row = block_first + i;
      factor[i] = weight ? weight[row * columns.weight_stride_query] : 1.0f;
      pack_row(key_row<T>(p.q, batch, head, row), p.head_dim, q + i * p.head_dim);
    }
  }

  void weigh(const Visibility& see, int64_t panel, int64_t count) {
    multiply<Layout::row_step>(q, p.head_dim, block_count, key + panel * p.head_dim * kLanes,
                               p.head_dim * kLanes, count, p.head_dim,
                               [&](int64_t row, int i, f32x16 sum) {
                                 // A hidden key is hidden whatever its logit is, NaN included.
                                 const f32x16 added = load(bias + (panel + i) * kLanes);
                                 store(weights + i * kWeights + row * kLanes,
                                       select_equal(added, -kInfinity<float>, added, sum + added));
                               });
    for (int64_t i = 0; i < count; ++i) {
      float* tile = weights + i * kWeights;
      if (coverage[panel + i] == Coverage::some) {
        hide_rows<float>(see, block_first, block_count, panel_key(panel + i), tile);
      }
      for (int64_t row = 0; row < block_count; ++row) {
        float* at = tile + row * kLanes;
        const f32x16 weight = exp(load(at) - splat(lse[row])) * splat(factor[row]);
        store(at, select_equal(load(at), -kInfinity<float>, splat(0.0f), weight));
      }
    }
  }

  // Adds a block's statistics to the panel's.
  void add(int64_t panel, const float* tile) {
    float* at = mean + panel * kLanes;
    f32x16 total = splat(0.0f);
    if (columns.reduction == ColumnReduction::max) {
      total = load(at);
      for (int64_t row = 0; row < block_count; ++row) total = max(load(tile + row * kLanes), total);
      store(at, total);
    } else {
      for (int64_t row = 0; row < block_count; ++row) total = total + load(tile + row * kLanes);
      if (columns.reduction == ColumnReduction::variance) {
        const f32x16 middle = total / splat(static_cast<float>(block_count));
        f32x16 squares = splat(0.0f);
        for (int64_t row = 0; row < block_count; ++row) {
          const f32x16 distance = load(tile + row * kLanes) - middle;
          squares = fma(distance, distance, squares);
        }
        join(panel, block_count, middle, squares);
      } else {
        store(at, load(at) + total);
      }
    }
    if (columns.reduction != ColumnReduction::variance) seen[panel] += block_count;
  }

  // Mean and squares of two sets together (Chan, Golub and LeVeque).
  void join(int64_t panel, int64_t count, f32x16 middle, f32x16 squares) {
    if (count == 0) return;
    const int64_t before = seen[panel];
    seen[panel] += count;
    const float share = static_cast<float>(count) / static_cast<float>(seen[panel]);
    const f32x16 old = load(mean + panel * kLanes), distance = middle - old;
    const f32x16 joint = distance * distance * splat(share * static_cast<float>(before));
    store(mean + panel * kLanes, fma(distance, splat(share), old));
    store(square + panel * kLanes, load(square + panel * kLanes) + squares + joint);
  }

  void finish(int64_t head, int64_t panel) {
    const int64_t hidden = p.queries - seen[panel];
    float* at = mean + panel * kLanes;
    f32x16 result = load(at);
    switch (columns.reduction) {
      case ColumnReduction::sum: break;
      case ColumnReduction::mean:
        result = result / splat(static_cast<float>(max(p.queries, 1)));
        break;
      case ColumnReduction::max:
        if (hidden > 0 || p.queries == 0) result = max(result, splat(0.0f));
        break;
      case ColumnReduction::variance:
        join(panel, hidden, splat(0.0f), splat(0.0f));
        result = load(square + panel * kLanes) / splat(static_cast<float>(max(p.queries - 1, 1)));
        break;
    }
    result = fma(result, splat(columns.factor), splat(columns.offset));
    const int64_t first = panel_key(panel);
    store_row(columns.columns + (batch * p.heads_q + head) * p.keys + first, result,
              last_key(panel) - first + 1);
  }
};

}  // namespace

void attention_columns(const AttentionColumnsParams& columns, const Parallel& parallel) {
  const AttentionParams& p = columns.attention;
  int64_t panels = p.head_dim <= 128 ? kMaxPanels : kMaxPanels / 2;
  const int64_t heads = p.batch * p.heads_kv;
  while (panels > 2 && heads * divide_up(p.keys, panels * kLanes) < 4 * parallel.threads) {
    panels /= 2;
  }
  const int64_t blocks = divide_up(p.keys, panels * kLanes);
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, heads * blocks, [&](int64_t task, int64_t) {
      // Under causality the first keys cost most: they go first.
      const int64_t head = task % heads, first = task / heads * panels * kLanes;
      ColumnTask(columns, head / p.heads_kv, head % p.heads_kv, first, panels).template run<T>();
    });
  });
}

}  // namespace tokred::TOKRED_ISA
