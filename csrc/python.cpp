// tokred._C: what the build and the machine are, and the launch plans of the CUDA kernels. No
// tensors: every op works without this module.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/plan_match.h"
#include "cuda/plan_merge.h"
#include "cuda/plan_sparse_attn.h"

extern "C" const char* tokred_cpu_isa();
extern "C" const char* tokred_best_cpu_isa();
extern "C" bool tokred_set_cpu_isa(const char* name);

namespace py = pybind11;
using namespace py::literals;
using namespace tokred::cuda;

namespace {

py::dict build_info() {
  return py::dict("version"_a = TOKRED_VERSION, "compiler"_a = __VERSION__,
                  "cuda"_a = static_cast<bool>(TOKRED_CUDA_BUILD));
}

py::dict describe(const LaunchPlan& plan) {
  return py::dict("grid"_a = py::make_tuple(plan.grid[0], plan.grid[1], plan.grid[2]),
                  "block"_a = plan.block, "shared_bytes"_a = plan.shared_bytes);
}

// The launches of match, and of bipartite_soft_matching over `tokens` tokens, in order.
py::dict plans_of_match(const MatchShape& shape, int64_t tokens) {
  py::dict plans("match"_a = describe(plan_match(shape)));
  if (is_small_item(tokens, shape.rows)) {
    plans["bipartite"] = describe(plan_small_items(shape));
  } else {
    plans["bipartite"] = describe(plan_large_items(shape.batch));
  }
  return plans;
}

py::dict plans_of_merge(int64_t batch, int64_t tokens, int64_t num_out) {
  py::dict plans("merge"_a = describe(plan_merge(batch, num_out)),
                 "unmerge"_a = describe(plan_merge_rows(batch * tokens)),
                 "compose"_a = describe(plan_compose(batch * tokens)));
  if (!lists_members_in_block(tokens)) {
    plans["list_members"] = describe(plan_list_members(batch, num_out));
  }
  return plans;
}

py::dict plans_of_attention(const AttentionShape& shape) {
  return py::dict("forward"_a = describe(plan_forward(shape)),
                  "delta"_a = describe(plan_delta(shape)),
                  "grad_query"_a = describe(plan_grad_query(shape)),
                  "grad_key"_a = describe(plan_grad_key(shape)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection: the build, the CPU instruction set, and CUDA launch plans.";
  m.def("build_info", &build_info);
  m.def("cpu_isa", &tokred_cpu_isa, "The instruction set that the CPU kernels run on.");
  m.def("best_cpu_isa", &tokred_best_cpu_isa, "The best one of this machine.");
  m.def("set_cpu_isa", [](const std::string& name) { return tokred_set_cpu_isa(name.c_str()); },
        "name"_a, "generic, avx2 or avx512; False where the machine lacks it.");
  m.def(
      "plan_match",
      [](int64_t batch, int64_t rows, int64_t tokens, bool is_float, bool aligned, bool general) {
        return plans_of_match({batch, rows, is_float, aligned, general}, tokens);
      },
      "batch"_a, "rows"_a, "tokens"_a, "is_float"_a = false, "aligned"_a = true,
      "general"_a = false, "name -> {grid, block, shared_bytes}");
  m.def("plan_merge", &plans_of_merge, "batch"_a, "tokens"_a, "num_out"_a,
        "name -> {grid, block, shared_bytes}");
  m.def(
      "plan_attention",
      [](int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t queries, int64_t keys,
         int64_t head_dim, int64_t value_dim, bool is_float) {
        return plans_of_attention(
            {batch, heads_q, heads_kv, queries, keys, head_dim, value_dim, is_float});
      },
      "batch"_a, "heads_q"_a, "heads_kv"_a, "queries"_a, "keys"_a, "head_dim"_a, "value_dim"_a,
      "is_float"_a = false, "name -> {grid, block, shared_bytes}");
}
