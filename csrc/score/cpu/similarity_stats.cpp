// similarity_stats on the CPU: the similarity matrix is never stored. As in match sixteen rows
// are the lanes of a panel and the columns stream past, so every statistic stays in its lane; of
// each block of columns a tile of similarities lies in the first-level cache while the statistics
// are updated. Columns are scaled and converted once, into the workspace.
//
// [8, 1024, 64]: 1.1 GFLOP, 5 ms at 200 GFLOP/s, and about 30 instructions of eight lanes for the
// statistics of sixteen pairs beside 128 FMA.
#include "attention/cpu/tile.h"
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

void list_columns(const SimilarityStatsParams& p, const Columns& columns, int64_t item) {
  int32_t count = 0;
  for (int64_t j = 0; j < p.columns; ++j) {
    columns.index[count] = static_cast<int32_t>(j);
    count += !masked(p.mask_b, p.mask_b_stride_batch, p.mask_b_stride_token, item, j);
  }
  *columns.count = count;
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
    constexpr int64_t kChannels = 64;  // transposed at a time
    const T* row[kLanes];
    float scale[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = panel_row(panel) + lane;
      row[lane] = i < p.rows
                      ? static_cast<const T*>(p.a) + item * p.a_stride_batch + i * p.a_stride_token
                      : nullptr;
      scale[lane] = p.metric == Metric::half_cosine ? 0.5f : p.metric == Metric::l2 ? 2.0f : 1.0f;
      offset[panel * kLanes + lane] = 0;
      if (!row[lane] || p.metric == Metric::dot) continue;
      const float squared = squared_norm(row[lane], p.channels);
      if (p.metric == Metric::l2) offset[panel * kLanes + lane] = -squared;
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
      transpose(chunk, kLanes, channels, rows + (panel * p.channels + c) * kLanes);
    }
    statistics[panel].clear();
  }

  // How many of the pairs of a panel with columns [first, last] are partners.
  Coverage coverage_of(int64_t panel, int64_t first, int64_t last) const {
    const int64_t row = panel_row(panel), end = last_row(panel);
    Coverage result = Coverage::all;
    if (p.block_size > 0) {
      if (last / p.block_size < row / p.block_size || first / p.block_size > end / p.block_size) {
        return Coverage::none;
      }
      const int64_t lowest = min(first, row), highest = max(last, end);
      if (lowest / p.block_size != highest / p.block_size) result = Coverage::some;
    }
    if (p.exclude_self && first <= end && row <= last) result = Coverage::some;
    return result;
  }

  template <Energy kEnergy>
  void run() {
    const int64_t total = *columns.count;
    for (int64_t first = 0; first < total; first += kBlock) {
      const int64_t count = min(kBlock, total - first);
      const int32_t* index = columns.index + first;
      const bool any = cover_panels(panels, coverage, [&](int64_t panel) {
        return coverage_of(panel, index[0], index[count - 1]);
      });
      if (!any) continue;
      visit_panels<float>(panels, coverage, [&](int64_t panel, int64_t together) {
        fill_tiles(panel, together, first, count);
        for (int64_t i = 0; i < together; ++i) {
          const Partners partners(p, panel_row(panel + i));
          const float* tile = tiles + i * kTile;
          if (coverage[panel + i] == Coverage::all) {
            add_tile<true, kEnergy>(p, tile, index, count, partners, statistics[panel + i]);
          } else {
            add_tile<false, kEnergy>(p, tile, index, count, partners, statistics[panel + i]);
          }
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
    Statistics& s = statistics[panel];
    for (int64_t row = panel_row(panel); row <= last_row(panel); ++row) {
      const int64_t lane = row - panel_row(panel), at = item * p.rows + row;
      const bool hidden = masked(p.mask_a, p.mask_a_stride_batch, p.mask_a_stride_token, item, row);
      const bool found = s.number[lane] > 0 && !hidden;
      p.mean[at] = found ? s.mean[lane] : 0;
      p.variance[at] = found ? s.squares[lane] / s.number[lane] : 0;
      p.greatest[at] = found ? s.greatest[lane] : -kInfinity<float>;
      p.energy[at] = found ? s.energy[lane] / s.number[lane] : 0;
      p.index[at] = found ? s.index[lane] : -1;
      p.count[at] = found ? s.count[lane] : 0;
    }
  }
};

template <class T>
void similarity_all(const SimilarityStatsParams& p, const Parallel& parallel) {
  const int64_t panels = panels_of_task(p, parallel);
  Workspace workspace(p.workspace);
  const Scratch scratch(p, panels, parallel, workspace);
  parallel_tasks(parallel, p.batch,
                 [&](int64_t item, int64_t) { list_columns(p, scratch.of(item), item); });
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
  return workspace_bytes(
      [&](Workspace& workspace) { Scratch(p, panels_of_task(p, parallel), parallel, workspace); });
}

void similarity_stats(const SimilarityStatsParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { similarity_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
