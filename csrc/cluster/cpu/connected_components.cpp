// connected_components: the edges of the grid, a task a row; then union by smaller position, an
// item a task, and one ascending pass that numbers the roots.
#include "cluster/params.h"
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr uint8_t kRight = 1, kBelow = 2;  // joined to the neighbour there

// Whether two rows are nearer than the threshold; a sum of sixteen partial sums.
template <class T>
bool is_near(const ConnectedComponentsParams& p, const T* x, const T* y) {
  if (p.metric == Metric::cosine) {
    const float scale = inverse_norm(squared_norm(x, p.channels));
    const float other = inverse_norm(squared_norm(y, p.channels));
    return 1.0f - dot_row(x, y, p.channels) * scale * other < p.threshold;
  }
  f32x16 total = splat(0.0f);
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    const f32x16 apart = load_row(x + c, p.channels - c) - load_row(y + c, p.channels - c);
    total = fma(apart, apart, total);
  }
  return __builtin_sqrtf(sum(total)) < p.threshold;
}

bool is_masked(const ConnectedComponentsParams& p, int64_t item, int64_t token) {
  return p.mask && !p.mask[item * p.mask_stride_batch + token * p.mask_stride_token];
}

template <class T>
void find_edges(const ConnectedComponentsParams& p, int64_t item, int64_t row, uint8_t* edges) {
  const T* x = static_cast<const T*>(p.x) + item * p.stride_batch + row * p.stride_row;
  for (int64_t column = 0; column < p.width; ++column, x += p.stride_column) {
    const int64_t token = row * p.width + column;
    uint8_t edge = 0;
    if (!is_masked(p, item, token)) {
      if (column + 1 < p.width && !is_masked(p, item, token + 1)) {
        edge |= is_near(p, x, x + p.stride_column) ? kRight : 0;
      }
      if (row + 1 < p.height && !is_masked(p, item, token + p.width)) {
        edge |= is_near(p, x, x + p.stride_row) ? kBelow : 0;
      }
    }
    edges[token] = edge;
  }
}

// The root of a token's tree, the smallest position in it; halves the path.
int32_t root_of(int32_t* parent, int32_t token) {
  while (parent[token] != token) {
    parent[token] = parent[parent[token]];
    token = parent[token];
  }
  return token;
}

void join(int32_t* parent, int32_t a, int32_t b) {
  a = root_of(parent, a);
  b = root_of(parent, b);
  if (a < b) {
    parent[b] = a;
  } else {
    parent[a] = b;
  }
}

// Parents are in place of the labels, and precede their children, so that they are numbered first.
void label_item(const ConnectedComponentsParams& p, int64_t item, const uint8_t* edges) {
  const int64_t tokens = p.height * p.width;
  int32_t* labels = p.labels + item * tokens;
  for (int64_t token = 0; token < tokens; ++token) labels[token] = static_cast<int32_t>(token);
  for (int64_t token = 0; token < tokens; ++token) {
    const auto at = static_cast<int32_t>(token);
    if (edges[token] & kRight) join(labels, at, at + 1);
    if (edges[token] & kBelow) join(labels, at, at + static_cast<int32_t>(p.width));
  }
  int32_t count = 0;
  for (int64_t token = 0; token < tokens; ++token) {
    if (is_masked(p, item, token)) {
      labels[token] = -1;
    } else {
      labels[token] = labels[token] == token ? count++ : labels[labels[token]];
    }
  }
  p.counts[item] = count;
}

}  // namespace

int64_t connected_components_workspace(const ConnectedComponentsParams& p, const Parallel&) {
  return p.batch * p.height * p.width;
}

void connected_components(const ConnectedComponentsParams& p, const Parallel& parallel) {
  auto* edges = static_cast<uint8_t*>(p.workspace);
  const int64_t tokens = p.height * p.width;
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch * p.height, [&](int64_t task, int64_t) {
      const int64_t item = task / p.height;
      find_edges<T>(p, item, task % p.height, edges + item * tokens);
    });
  });
  parallel_tasks(parallel, p.batch,
                 [&](int64_t item, int64_t) { label_item(p, item, edges + item * tokens); });
}

}  // namespace tokred::TOKRED_ISA
