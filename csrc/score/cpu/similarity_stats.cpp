// similarity_stats on the CPU: the similarity matrix is never stored. As in match sixteen rows
// are the lanes of a panel and the columns stream past, so every statistic stays in its lane; of
// each block of columns a tile of similarities lies in the first-level cache while the statistics
// are updated. Columns are scaled and converted once, into the workspace.
//
// Where both sets are the same each pair is multiplied once: a block of columns is multiplied with
// every panel that is not before it, and the products, transposed, serve the rows of the block as
// well. All rows get their columns in the same order, so the results are the same bits.
//
// [8, 1024, 64]: 1.1 GFLOP, 5 ms at 200 GFLOP/s, and about 30 instructions of eight lanes for the
// statistics of sixteen pairs beside 128 FMA.
#include "attention/cpu/tile.h"
#include "common/cpu/items.h"
#include "common/cpu/panel_products.h"
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "common/cpu/workspace.h"
#include "score/cpu/similarity_tile.h"
#include "score/params.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int64_t kPackedTogether = 64;  // columns of a packing task

// One batch entry's columns that take part, in order: s = packed row . packed column + offsets.
struct Columns {
  int32_t* count;   // [1]
  int32_t* index;   // [Nb]
  float* offset;    // [Nb]
  float* packed;    // [Nb][C]
};

// The workspace: the columns of all batch entries, and for each worker the panels of a task's rows.
struct Scratch {
  int32_t *counts, *indices;
  float *offsets, *packed, *panels;
  int64_t columns, channels, panel_floats;

  Scratch(const SimilarityStatsParams& p, int64_t task_panels, const Parallel& parallel,
          Workspace& workspace)
      : columns(round_up(p.columns, kLanes)), channels(p.channels),
        panel_floats(round_up(task_panels * kLanes * p.channels, kLanes)) {
    counts = workspace.allocate<int32_t>(p.batch);
    indices = workspace.allocate<int32_t>(p.batch * columns);
    offsets = workspace.allocate<float>(p.batch * columns);
    packed = workspace.allocate<float>(p.batch * columns * channels);
    panels = workspace.allocate<float>(parallel.threads * panel_floats);
  }
  Columns of(int64_t item) const {
    return {counts + item, indices + item * columns, offsets + item * columns,
            packed + item * columns * channels};
  }
};

int64_t panels_of_task(const SimilarityStatsParams& p, const Parallel& parallel) {
  int64_t panels = p.channels <= 128 ? kMaxPanels : p.channels <= 512 ? 4 : 2;
  while (panels > 2 && p.batch * divide_up(p.rows, panels * kLanes) < 4 * parallel.threads) {
    panels /= 2;
  }
  return panels;
}

TOKRED_INLINE bool normalises(Metric metric) {
  return metric == Metric::cosine || metric == Metric::half_cosine;
}
TOKRED_INLINE bool masked(const bool* mask, int64_t stride_batch, int64_t stride_token,
                          int64_t item, int64_t t) {
  return mask && !mask[item * stride_batch + t * stride_token];
}

// The tokens of b that take part; returns how many.
int32_t list_tokens(const SimilarityStatsParams& p, int64_t item, int32_t* index) {
  int32_t count = 0;
  for (int64_t j = 0; j < p.columns; ++j) {
    index[count] = static_cast<int32_t>(j);
    count += !masked(p.mask_b, p.mask_b_stride_batch, p.mask_b_stride_token, item, j);
  }
  return count;
}

template <class T>
const T* token_row(const SimilarityStatsParams& p, int64_t item, int64_t row) {
  return static_cast<const T*>(p.a) + item * p.a_stride_batch + row * p.a_stride_token;
}
TOKRED_INLINE float metric_scale(Metric metric) {
  return metric == Metric::half_cosine ? 0.5f : metric == Metric::l2 ? 2.0f : 1.0f;
}

// Sixteen rows as a panel [C][16], of length `length` where the metric normalises, and their
// offsets; null rows are zeros.
template <class T>
void pack_rows(const SimilarityStatsParams& p, const T* const (&row)[kLanes], float length,
               float* panel, float* offset) {
  constexpr int64_t kChannels = 64;  // transposed at a time
  float scale[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    scale[lane] = length;
    offset[lane] = 0;
    if (!row[lane] || p.metric == Metric::dot) continue;
    const float squared = squared_norm(row[lane], p.channels);
    if (p.metric == Metric::l2) offset[lane] = -squared;
    if (normalises(p.metric)) scale[lane] *= inverse_norm(squared);
  }
  for (int64_t c = 0; c < p.channels; c += kChannels) {
    const int64_t channels = min(p.channels - c, kChannels);
    alignas(64) float chunk[kLanes * kChannels];
    for (int lane = 0; lane < kLanes; ++lane) {
      float* to = chunk + lane * channels;
      if (row[lane]) pack_row(row[lane] + c, channels, to);
      for (int64_t i = 0; i < channels; ++i) to[i] = row[lane] ? to[i] * scale[lane] : 0.0f;
    }
    transpose(chunk, kLanes, channels, panel + c * kLanes);
  }
}

// Row `at` of all rows, by a lane of the statistics; none without partners.
void write_row(const SimilarityStatsParams& p, int64_t at, const Statistics* statistics,
               int64_t lane) {
  const bool found = statistics && statistics->number[lane] > 0;
  p.mean[at] = found ? statistics->mean[lane] : 0;
  p.variance[at] = found ? statistics->squares[lane] / statistics->number[lane] : 0;
  p.largest[at] = found ? statistics->largest[lane] : -kInfinity<float>;
  p.energy[at] = found ? statistics->energy[lane] / statistics->number[lane] : 0;
  p.index[at] = found ? statistics->index[lane] : -1;
  p.count[at] = found ? statistics->count[lane] : 0;
}

template <class T>
void pack_columns(const SimilarityStatsParams& p, const Columns& columns, int64_t item,
                  int64_t first) {
  const int64_t end = min(first + kPackedTogether, *columns.count);
  for (int64_t j = first; j < end; ++j) {
    const T* row =
        static_cast<const T*>(p.b) + item * p.b_stride_batch + columns.index[j] * p.b_stride_token;
    float* to = columns.packed + j * p.channels;
    pack_row(row, p.channels, to);
    columns.offset[j] = p.metric == Metric::half_cosine ? 0.5f : 0.0f;
    if (p.metric == Metric::dot) continue;
    const float squared = squared_norm(row, p.channels);
    if (p.metric == Metric::l2) columns.offset[j] = -squared;
    if (!normalises(p.metric)) continue;
    const float scale = inverse_norm(squared);
    for (int64_t c = 0; c < p.channels; ++c) to[c] *= scale;
  }
}

// Up to eight panels of rows.
struct RowTask {
  static constexpr int64_t kTile = kBlock * kLanes;

  const SimilarityStatsParams& p;
  const Columns columns;
  const int64_t item, first_row, panels;
  float* rows;                       // [panel][C][16]
  float offset[kMaxPanels * kLanes];
  Coverage coverage[kMaxPanels];
  Statistics statistics[kMaxPanels];
  alignas(64) float tiles[kTilePanels<float> * kTile];

  RowTask(const SimilarityStatsParams& params, const Columns& of_item, int64_t batch, int64_t first,
          int64_t max_panels, float* memory)
      : p(params), columns(of_item), item(batch), first_row(first),
        panels(min(max_panels, divide_up(p.rows - first, kLanes))), rows(memory) {}

  int64_t panel_row(int64_t panel) const { return first_row + panel * kLanes; }
  int64_t last_row(int64_t panel) const { return min(panel_row(panel) + kLanes, p.rows) - 1; }

  template <class T>
  void load_panel(int64_t panel) {
    const T* row[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = panel_row(panel) + lane;
      row[lane] = i < p.rows ? token_row<T>(p, item, i) : nullptr;
    }
    pack_rows(p, row, metric_scale(p.metric), rows + panel * p.channels * kLanes,
              offset + panel * kLanes);
    statistics[panel].clear();
  }

  template <Energy kEnergy>
  void run() {
    const int64_t total = *columns.count;
    for (int64_t first = 0; first < total; first += kBlock) {
      const int64_t count = min(kBlock, total - first);
      const int32_t* index = columns.index + first;
      const bool any = cover_panels(panels, coverage, [&](int64_t panel) {
        return coverage_of(p, panel_row(panel), last_row(panel), index[0], index[count - 1]);
      });
      if (!any) continue;
      visit_panels<float>(panels, coverage, [&](int64_t panel, int64_t together) {
        fill_tiles(panel, together, first, count);
        for (int64_t i = 0; i < together; ++i) {
          const int64_t first_of = panel_row(panel + i);
          const Partners partners(p, [&](int lane) { return first_of + lane; });
          add_tile<kEnergy>(coverage[panel + i], p, tiles + i * kTile, index, count, partners,
                            statistics[panel + i]);
        }
      });
    }
    for (int64_t panel = 0; panel < panels; ++panel) finish(panel);
  }

  void fill_tiles(int64_t panel, int64_t together, int64_t first, int64_t count) {
    multiply<Layout::row_step>(
        columns.packed + first * p.channels, p.channels, count, rows + panel * p.channels * kLanes,
        p.channels * kLanes, together, p.channels, [&](int64_t j, int i, f32x16 sum) {
          const f32x16 s = sum + splat(columns.offset[first + j]);
          store(tiles + i * kTile + j * kLanes, s + load(offset + (panel + i) * kLanes));
        });
  }

  void finish(int64_t panel) {
    for (int64_t row = panel_row(panel); row <= last_row(panel); ++row) {
      const bool hidden = masked(p.mask_a, p.mask_a_stride_batch, p.mask_a_stride_token, item, row);
      write_row(p, item * p.rows + row, hidden ? nullptr : &statistics[panel],
                row - panel_row(panel));
    }
  }
};

// A set compared with itself: its tokens that take part, in order, are lanes of panels.
struct SameSet {
  int64_t item, count, tiles;
  int32_t* index;          // [N]
  float* offset;           // [tiles][16]
  float* panels;           // [tiles][C][16]
  Statistics* statistics;  // [tiles]
  float* strip;            // [tiles][kBlock][16]: dot products with a block of tokens
};

constexpr int64_t kBlockTiles = kBlock / kLanes;
constexpr int64_t kPairwiseChannels = 128;  // from here on the products are most of the work
static_assert(kBlock % kLanes == 0);

// Whether a and b are the same tokens, and every token is a partner of most others.
bool is_same_set(const SimilarityStatsParams& p) {
  return p.a == p.b && p.rows == p.columns && p.a_stride_batch == p.b_stride_batch &&
         p.a_stride_token == p.b_stride_token && p.mask_a == p.mask_b &&
         (!p.mask_a || (p.mask_a_stride_batch == p.mask_b_stride_batch &&
                        p.mask_a_stride_token == p.mask_b_stride_token)) &&
         p.channels >= kPairwiseChannels && (p.block_size == 0 || p.block_size >= 4 * kBlock);
}
ItemThreads item_threads(const SimilarityStatsParams& p, const Parallel& parallel) {
  return ItemThreads(parallel, p.batch, p.rows >= 4 * kBlock);
}

SameSet carve(const SimilarityStatsParams& p, Workspace& workspace) {
  SameSet s{};
  s.tiles = divide_up(p.rows, kLanes);
  s.index = workspace.allocate<int32_t>(s.tiles * kLanes);
  s.offset = workspace.allocate<float>(s.tiles * kLanes);
  s.panels = workspace.allocate<float>(s.tiles * kLanes * p.channels);
  s.statistics = workspace.allocate<Statistics>(s.tiles);
  s.strip = workspace.allocate<float>(s.tiles * kBlock * kLanes);
  return s;
}

template <Energy kEnergy>
struct SameSetTask {
  const SimilarityStatsParams& p;
  const SameSet& s;

  float* panel(int64_t tile) const { return s.panels + tile * p.channels * kLanes; }
  // Rows of the tile `of` by lanes of the tile.
  float* products(int64_t tile, int64_t of) const {
    return s.strip + (tile * kBlockTiles + of % kBlockTiles) * kLanes * kLanes;
  }
  int64_t tokens(int64_t block) const { return min(s.count - block * kBlock, kBlock); }

  // Multiplies the tile with the block of tokens, which is its own or an earlier one; an earlier
  // block's tokens join the statistics.
  void multiply_tile(int64_t tile, int64_t block) const {
    const int64_t last = min((block + 1) * kBlockTiles, tile + 1);
    std::memset(products(tile, 0), 0, sizeof(float) * kBlock * kLanes);
    for (int64_t c = 0; c < p.channels; c += kProductChannels) {
      const int64_t channels = min(kProductChannels, p.channels - c);
      for (int64_t of = block * kBlockTiles; of < last; ++of) {
        add_products(panel(of) + c * kLanes, panel(tile) + c * kLanes, channels,
                     products(tile, of));
      }
    }
    if (tile / kBlockTiles != block) join(tile, block, products(tile, 0));
  }

  // Adds to the statistics of a tile of the block the tokens of the block and of all later ones,
  // from the products of those, transposed.
  void add_transposed(int64_t tile, int64_t block) const {
    alignas(64) float dots[kBlock * kLanes];
    for (int64_t other = block; other * kBlock < s.count; ++other) {
      const int64_t last = min((other + 1) * kBlockTiles, s.tiles);
      for (int64_t of = other * kBlockTiles; of < last; ++of) {
        float* to = dots + of % kBlockTiles * kLanes * kLanes;
        if (of <= tile) {
          std::memcpy(to, products(tile, of), sizeof(float) * kLanes * kLanes);
        } else {
          transpose(products(of, tile), kLanes, kLanes, to);
        }
      }
      join(tile, other, dots);
    }
  }

  // Statistics of the tile's rows over a block of columns [tokens][16].
  void join(int64_t tile, int64_t block, const float* dots) const {
    const int64_t row = tile * kLanes, end = min(row + kLanes, s.count) - 1;
    const int32_t* index = s.index + block * kBlock;
    const int64_t count = tokens(block);
    const Coverage coverage =
        coverage_of(p, s.index[row], s.index[end], index[0], index[count - 1]);
    if (coverage == Coverage::none) return;
    alignas(64) float values[kBlock * kLanes];
    const f32x16 scale = splat(metric_scale(p.metric)), offset = load(s.offset + row);
    for (int64_t j = 0; j < count; ++j) {
      const float of_column = p.metric == Metric::half_cosine ? 0.5f : s.offset[block * kBlock + j];
      const f32x16 value = fma(scale, load(dots + j * kLanes), splat(of_column));
      store(values + j * kLanes, value + offset);
    }
    const Partners partners(p, [&](int lane) { return s.index[min(row + lane, end)]; });
    add_tile<kEnergy>(coverage, p, values, index, count, partners, s.statistics[tile]);
  }

  void run(const Parallel& parallel) const {
    for (int64_t block = 0; block * kBlock < s.count; ++block) {
      const int64_t first = block * kBlockTiles;
      parallel_tasks(parallel, s.tiles - first,
                     [&](int64_t task, int64_t) { multiply_tile(first + task, block); });
      parallel_tasks(parallel, min(kBlockTiles, s.tiles - first),
                     [&](int64_t task, int64_t) { add_transposed(first + task, block); });
    }
  }
};

template <class T>
void similarity_of_item(const SimilarityStatsParams& p, SameSet s, const Parallel& parallel) {
  s.count = list_tokens(p, s.item, s.index);
  s.tiles = divide_up(s.count, kLanes);
  parallel_tasks(parallel, s.tiles, [&](int64_t tile, int64_t) {
    const T* row[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t i = tile * kLanes + lane;
      row[lane] = i < s.count ? token_row<T>(p, s.item, s.index[i]) : nullptr;
    }
    pack_rows(p, row, 1.0f, s.panels + tile * p.channels * kLanes, s.offset + tile * kLanes);
    s.statistics[tile].clear();
  });
  switch (p.energy_kind) {
    case Energy::none: SameSetTask<Energy::none>{p, s}.run(parallel); break;
    case Energy::elu: SameSetTask<Energy::elu>{p, s}.run(parallel); break;
    case Energy::gaussian: SameSetTask<Energy::gaussian>{p, s}.run(parallel); break;
  }
  int64_t next = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const bool listed = next < s.count && s.index[next] == row;
    write_row(p, s.item * p.rows + row, listed ? &s.statistics[next / kLanes] : nullptr,
              next % kLanes);
    next += listed;
  }
}

template <class T>
void similarity_of_same_sets(const SimilarityStatsParams& p, const Parallel& parallel) {
  const auto memory = [&](int64_t, Workspace& workspace) { return carve(p, workspace); };
  item_threads(p, parallel)
      .for_each(p.batch, p.workspace, memory,
                [&](int64_t item, SameSet set, const Parallel& inside) {
                  set.item = item;
                  similarity_of_item<T>(p, set, inside);
                });
}

template <class T>
void similarity_all(const SimilarityStatsParams& p, const Parallel& parallel) {
  const int64_t panels = panels_of_task(p, parallel);
  Workspace workspace(p.workspace);
  const Scratch scratch(p, panels, parallel, workspace);
  parallel_tasks(parallel, p.batch, [&](int64_t item, int64_t) {
    const Columns columns = scratch.of(item);
    *columns.count = list_tokens(p, item, columns.index);
  });
  const int64_t parts = divide_up(p.columns, kPackedTogether);
  parallel_tasks(parallel, p.batch * parts, [&](int64_t task, int64_t) {
    const int64_t item = task / parts;
    pack_columns<T>(p, scratch.of(item), item, task % parts * kPackedTogether);
  });
  const int64_t tasks = divide_up(p.rows, panels * kLanes);
  parallel_tasks(parallel, p.batch * tasks, [&](int64_t task, int64_t worker) {
    const int64_t item = task / tasks;
    RowTask rows(p, scratch.of(item), item, task % tasks * panels * kLanes, panels,
                 scratch.panels + worker * scratch.panel_floats);
    for (int64_t panel = 0; panel < rows.panels; ++panel) rows.template load_panel<T>(panel);
    switch (p.energy_kind) {
      case Energy::none: rows.template run<Energy::none>(); break;
      case Energy::elu: rows.template run<Energy::elu>(); break;
      case Energy::gaussian: rows.template run<Energy::gaussian>(); break;
    }
  });
}

}  // namespace

int64_t similarity_stats_workspace(const SimilarityStatsParams& p, const Parallel& parallel) {
  if (is_same_set(p)) {
    return item_threads(p, parallel).bytes([&](int64_t, Workspace& workspace) {
      return carve(p, workspace);
    });
  }
  return workspace_bytes(
      [&](Workspace& workspace) { Scratch(p, panels_of_task(p, parallel), parallel, workspace); });
}

void similarity_stats(const SimilarityStatsParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() {
    is_same_set(p) ? similarity_of_same_sets<T>(p, parallel) : similarity_all<T>(p, parallel);
  });
}

}  // namespace tokred::TOKRED_ISA
