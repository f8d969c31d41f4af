// forest_roots: every path is walked up to the first token whose root is known, and once more to
// write the root, so that a token is visited twice: O(N).
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"
#include "merge/params.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int32_t kUnknown = -3, kOnThisPath = -2, kInCycle = -1;

void find_roots(const ForestRootsParams& p, int64_t item) {
  int32_t* root = p.root + item * p.tokens;
  int32_t* children = p.children + item * p.tokens;
  const auto parent_of = [&](int64_t i) {
    const int32_t parent = p.parent[item * p.parent_stride_batch + i * p.parent_stride_token];
    return parent < p.tokens ? parent : -1;
  };
  for (int64_t i = 0; i < p.tokens; ++i) {
    children[i] = 0;
    root[i] = parent_of(i) < 0 ? static_cast<int32_t>(i) : kUnknown;
  }
  for (int64_t i = 0; i < p.tokens; ++i) {
    if (const int32_t parent = parent_of(i); parent >= 0) ++children[parent];
    int64_t at = i;
    for (; root[at] == kUnknown; at = parent_of(at)) root[at] = kOnThisPath;
    const int32_t found = root[at] == kOnThisPath ? kInCycle : root[at];
    for (at = i; root[at] == kOnThisPath; at = parent_of(at)) root[at] = found;
  }
}

}  // namespace

void forest_roots(const ForestRootsParams& p, const Parallel& parallel) {
  parallel_tasks(parallel, p.batch, [&](int64_t item, int64_t) { find_roots(p, item); });
}

}  // namespace tokred::TOKRED_ISA
