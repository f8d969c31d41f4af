// tokred._C: what the build and the machine are, what the machine can do (its ceilings), and the
// launch plans of the CUDA kernels. No tensors: every op works without this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "attention/cuda/plan.h"
#include "attention/cuda/plan_decode.h"
#include "ceilings/measure.h"
#include "cluster/cuda/plan.h"
#include "kv_pack/cuda/plan.h"
#include "linear_attn/cuda/plan.h"
#include "match/cuda/plan.h"
#include "merge/cuda/plan.h"
#include "packed_attn/cuda/plan_codes.h"
#include "score/cuda/plan.h"
#include "sparse_attn/cuda/plan_unmerged.h"
#include "topk/cuda/plan.h"

extern "C" const char* tokred_cpu_isa();
extern "C" const char* tokred_best_cpu_isa();
extern "C" bool tokred_cpu_vnni();
extern "C" bool tokred_set_cpu_isa(const char* name);
extern "C" bool tokred_set_cpu_vnni(bool use);

namespace py = pybind11;
using namespace py::literals;
using namespace tokred;
using namespace tokred::cuda;

namespace {

constexpr int64_t kSharedLimit = 227 << 10;  // of an H200, for which plans are made unless told

py::dict build_info() {
  return py::dict("version"_a = TOKRED_VERSION, "compiler"_a = __VERSION__,
                  "cuda"_a = static_cast<bool>(TOKRED_CUDA_BUILD));
}

py::dict describe(const LaunchPlan& plan) {
  return py::dict("grid"_a = py::make_tuple(plan.grid[0], plan.grid[1], plan.grid[2]),
                  "block"_a = plan.block, "shared_bytes"_a = plan.shared_bytes,
                  "kernel"_a = plan.kernel);
}

// The launches of match, and of bipartite_soft_matching over `tokens` tokens, in order.
py::dict plans_of_match(const MatchShape& shape, int64_t tokens, int64_t shared_limit) {
  py::dict plans("match"_a = describe(plan_match(shape)));
  if (shape.async() && !shape.general) {
    plans["column_terms"] = describe(plan_column_terms(shape.batch, tokens));
    plans["match_short"] = describe(plan_match_short(shape));
  }
  if (is_small_item(shape, tokens, shared_limit)) {
    plans["bipartite"] = describe(plan_small_items(shape, shared_limit));
  } else {
    plans["bipartite"] = describe(plan_large_items(shape.batch));
  }
  return plans;
}

// The launches of connected_components of `batch` grids.
py::dict plans_of_components(int64_t batch, int64_t tokens) {
  return py::dict("edges"_a = describe(plan_grid_edges(batch * tokens)),
                  "labels"_a = describe(plan_grid_labels(batch)));
}

// The launches of kmeans, and of the sums of distances of kmedoids.
py::dict plans_of_kmeans(int64_t batch, int64_t tokens, int64_t clusters) {
  return py::dict("clusters"_a = describe(plan_cluster_rows(batch * clusters)),
                  "tokens"_a = describe(plan_cluster_rows(batch * tokens)),
                  "round"_a = describe(plan_cluster_items(batch)),
                  "nearest"_a = describe(plan_nearest(batch, tokens)),
                  "distances"_a = describe(plan_distance_sums(batch, tokens)));
}

// The launch of ema_scan; its gradient adds that of compose, over its tokens.
py::dict plans_of_ema_scan(int64_t batch, int64_t channels) {
  return py::dict("ema_scan"_a = describe(plan_ema_scan(batch, channels)));
}

// The launches of dpc_knn.
py::dict plans_of_dpc_knn(int64_t batch, int64_t tokens, int64_t clusters, bool is_float,
                          bool aligned) {
  const int64_t places = batch * round_up(tokens, kPlaceThreads);
  return py::dict(
      "pairs"_a = describe(plan_distance_rows(batch, tokens, is_float, aligned && !is_float)),
      "clear"_a = describe(plan_places(batch * clusters)),
      "place"_a = describe(plan_places(places)));
}

// The launches of greedy_select, of every step where an item is in parts.
py::dict plans_of_greedy(int64_t batch, int64_t tokens, int64_t channels) {
  const int64_t parts = greedy_parts(tokens, channels);
  return py::dict("prepare"_a = describe(plan_greedy_tokens(batch * tokens)),
                  "pairs"_a = describe(plan_greedy_blocks(batch * tokens)),
                  "select"_a = describe(plan_greedy_blocks(batch * parts)),
                  "facility"_a = describe(plan_greedy_blocks(batch)));
}

py::dict plans_of_merge(int64_t batch, int64_t tokens, int64_t num_out) {
  py::dict plans("merge"_a = describe(plan_merge(batch, num_out)),
                 "unmerge"_a = describe(plan_merge_rows(batch * tokens)),
                 "items"_a = describe(plan_item_scan(batch)),
                 "compose"_a = describe(plan_compose(batch * tokens)));
  if (!lists_members_in_block(tokens)) {
    plans["list_members"] = describe(plan_list_members(batch, num_out));
  }
  return plans;
}

py::dict plans_of_attention(const AttentionShape& shape, int64_t shared_limit) {
  py::dict plans("forward"_a = describe(plan_forward(shape, shared_limit)),
                 "delta"_a = describe(plan_delta(shape)),
                 "grad_query"_a = describe(plan_grad_query(shape)),
                 "grad_key"_a = describe(plan_grad_key(shape)));
  if (takes_wgmma(shape, true, 90)) plans["wgmma"] = describe(plan_wgmma(shape));
  return plans;
}

// The launches of attention over lists (or over all keys, as one list), and how keys are split.
py::dict plans_of_lists(const ListShape& shape, int64_t shared_limit) {
  py::dict plans(
      "grad_query"_a = describe(plan_list_grad_query(shape, list_grad_query_blocks(shape))),
      "grad_key"_a = describe(plan_list_grad_key(shape)));
  if (!is_decode(shape)) {
    plans["forward"] = describe(plan_list_forward(shape, shared_limit));
    return py::dict("plans"_a = plans, "workspace_bytes"_a = 0);
  }
  const int64_t items = decode_launch_tiles(shape);
  const AttentionShape& a = shape.attention;
  const DecodeTiles tiles = decode_tiles(decode_head_dim(a.dim()), a.is_float, shared_limit);
  plans["decode"] = describe(plan_decode(shape, items, tiles));
  const bool splits = decode_splits(shape.length) > 1;
  if (splits) plans["combine"] = describe(plan_combine(shape, items));
  return py::dict("plans"_a = plans, "items"_a = decode_row_tiles(shape),
                  "split_length"_a = decode_split_length(shape.length),
                  "workspace_bytes"_a = decode_workspace_bytes(shape));
}

// The launches of the score family, with blocks of 64 tokens and similarities among the queries.
py::dict plans_of_score(const ScoreShape& s) {
  const int lanes = score_lanes(s.head_dim);
  const int64_t heads = s.batch * s.heads_kv, blocks = divide_up(s.keys, 64);
  return py::dict(
      "qk_score"_a = describe(plan_qk_score(heads, s.keys, lanes)),
      "qk_score_dims"_a = describe(plan_qk_score(heads, s.keys, kGatherLanes)),
      "qk_score_mean"_a = describe(plan_qk_score(s.batch, s.keys, lanes)),
      "reduce_heads"_a = describe(plan_score_elements(heads * s.queries * blocks)),
      "softmax"_a = describe(plan_softmax_rows(s.batch * s.heads_q * s.queries)),
      "block_pool"_a = describe(plan_block_pool(s.batch, s.heads_kv, s.keys, blocks)),
      "block_pool_whole"_a = describe(plan_block_pool(s.batch, s.heads_kv, s.keys, 1)),
      "block_score"_a = describe(plan_block_score(heads, s.rows(), blocks, lanes)),
      "attention_rows"_a = describe(plan_attention_rows(s)),
      "attention_columns"_a = describe(plan_attention_columns(s)),
      "similarity_stats"_a = describe(plan_similarity_stats(s.batch, s.queries, s.is_float, false)),
      "similarity_stats_async"_a = describe(plan_similarity_stats(s.batch, s.queries, false, true)),
      "transition_stats"_a = describe(plan_transition(s.batch * s.queries)));
}

// The launches of topk in order, of which the longest merge stands for all, and the scratch.
py::dict plans_of_topk(int64_t lists, int64_t columns, int64_t k, bool has_top_p) {
  const TopkShape shape{lists, columns, k, has_top_p};
  py::dict plans;
  switch (topk_path(shape)) {
    case TopkPath::warp: plans["warps"] = describe(plan_topk_warps(lists)); break;
    case TopkPath::small: plans["small"] = describe(plan_topk_blocks(lists, kSmallTopk)); break;
    case TopkPath::wide: plans["wide"] = describe(plan_topk_blocks(lists, kWideTopk)); break;
    case TopkPath::split:
      plans["parts"] = describe(plan_topk_parts(shape));
      plans["finish"] = describe(plan_topk_blocks(lists, kWideTopk));
      break;
    case TopkPath::sorted:
      plans["sort"] = describe(plan_sort_chunks(lists, columns));
      plans["merge"] =
          describe(plan_merge_runs(lists, columns, kSortChunkKeys, shape.max_chosen()));
      plans["write"] = describe(plan_sorted(lists));
      break;
  }
  return plans;
}

// The launches of compact, inverse_transform_sample and of a gather of `rows` rows of `columns`
// units.
py::dict plans_of_rows(int64_t rows, int64_t columns) {
  return py::dict("compact"_a = describe(plan_compact(rows, columns)),
                  "sample"_a = describe(plan_sample(rows)),
                  "gather"_a = describe(plan_gather(gather_blocks(rows, columns), 1)),
                  "eviction_slot"_a = describe(plan_eviction_slot(rows)),
                  "replace_token"_a = describe(plan_replace_token(rows)));
}

// The launches of kv_pack and kv_unpack, and of a kv_append of as many tokens to a cache with that
// window (0: none) of which each item may hold any number.
py::dict plans_of_packing(const PackFormat& f, int64_t heads, int64_t tokens, int64_t window) {
  const int64_t max_tokens = max_packed(f.axis, window, tokens, -1);
  py::dict plans("pack"_a = describe(plan_kv_pack(f, heads, tokens)),
                 "unpack"_a = describe(plan_packed_rows(f.head_dim, heads * tokens)),
                 "append"_a = describe(plan_kv_pack(f, heads, max_tokens)));
  const int64_t newest = tokens < window ? tokens : window;
  if (window > 0) plans["window"] = describe(plan_packed_rows(f.head_dim, heads * newest));
  return plans;
}

// The launches of packed_attention over all tokens and of packed_qk_score, keys and values alike.
py::dict plans_of_packed_attention(const AttentionShape& s, const PackFormat& f,
                                   int64_t shared_limit) {
  const ListShape shape = dense_list(s);
  const int64_t items = decode_launch_tiles(shape), heads = s.batch * s.heads_kv;
  if (s.is_wide()) {
    return py::dict("plans"_a = py::dict("decode"_a = describe(plan_wide_decode(shape, items)),
                                         "combine"_a = describe(plan_combine(shape, items))));
  }
  const int lanes = score_lanes(s.head_dim);
  const PackedCopy copy = packed_copy(f, f);
  const DecodeTiles tiles = packed_tiles(padded_head_dim(s.dim()), s.is_float, copy, shared_limit);
  py::dict plans("decode"_a = describe(plan_packed_decode(shape, items, copy, tiles)),
                 "score"_a = describe(plan_qk_score(heads, s.keys, lanes)),
                 "rotate_queries"_a = describe(plan_rotate_queries(s.batch * s.heads_q, lanes)));
  if (decode_splits(s.keys) > 1) plans["combine"] = describe(plan_combine(shape, items));
  if (rotates_later(s)) plans["rotate_out"] = describe(plan_rotate_out(s));
  if (!s.is_float && takes_fragments(DType::bf16, shape, f, f)) {
    const SideCopy side = side_copy(f, 0, 0);
    plans["codes"] = describe(plan_code_decode(shape, items, code_copy(side, side)));
    plans["score_codes"] = describe(plan_code_score(heads, s.keys, side));
  }
  return py::dict("plans"_a = plans, "items"_a = decode_row_tiles(shape),
                  "workspace_bytes"_a = decode_workspace_bytes(shape));
}

// Work and seconds of the rounds, as Python gets them.
using WorkAndSeconds = std::pair<int64_t, std::vector<double>>;

WorkAndSeconds as_pair(ceilings::Rounds rounds) { return {rounds.work, std::move(rounds.seconds)}; }

// Each returns (bytes or operations of a round, [seconds of each]); see ceilings/measure.h.
void define_ceilings(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def(
      "ceiling_read",
      [](const std::string& isa, int64_t bytes, int64_t threads, int64_t rounds) {
        return as_pair(ceilings::measure_read(isa, bytes, threads, rounds));
      },
      "isa"_a, "bytes"_a, "threads"_a, "rounds"_a, Unlocked(),
      "Streams an array through all threads: (bytes read, [seconds]).");
  m.def(
      "ceiling_copy",
      [](const std::string& isa, int64_t bytes, int64_t threads, int64_t rounds, bool past_caches) {
        return as_pair(ceilings::measure_copy(isa, bytes, threads, rounds, past_caches));
      },
      "isa"_a, "bytes"_a, "threads"_a, "rounds"_a, "non_temporal"_a, Unlocked(),
      "Copies an array: (bytes read and written, [seconds]).");
  m.def(
      "ceiling_gather",
      [](const std::string& isa, int64_t bytes, int64_t row_bytes, int64_t threads, int64_t rounds,
         bool shuffled) {
        return as_pair(ceilings::measure_gather(isa, bytes, row_bytes, threads, rounds, shuffled));
      },
      "isa"_a, "table_bytes"_a, "row_bytes"_a, "threads"_a, "rounds"_a, "shuffled"_a, Unlocked(),
      "Reads one row in eight of a table: (bytes read, [seconds]).");
  m.def(
      "ceiling_operations",
      [](const std::string& isa, const std::string& what, int64_t steps, int64_t threads,
         int64_t rounds) {
        return as_pair(ceilings::measure_operations(isa, what, steps, threads, rounds));
      },
      "isa"_a, "what"_a, "steps"_a, "threads"_a, "rounds"_a, Unlocked(),
      "multiply_add (f32), dot_int16 or dot_int8: (operations, [seconds]).");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection: the build, the CPU and what it can do, and CUDA launch plans.";
  define_ceilings(m);
  m.def("build_info", &build_info);
  m.def("cpu_isa", &tokred_cpu_isa, "The instruction set that the CPU kernels run on.");
  m.def("best_cpu_isa", &tokred_best_cpu_isa, "The best one of this machine.");
  m.def("cpu_vnni", &tokred_cpu_vnni, "Whether the AVX-512 kernels use VNNI on this machine.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { return tokred_set_cpu_isa(name.c_str()); },
      "name"_a, "generic, avx2 or avx512; False where the machine lacks it.");
  m.def("set_cpu_vnni", &tokred_set_cpu_vnni, "use"_a,
        "Whether they may; results are the same. False where the machine has no VNNI to use.");
  m.def(
      "plan_match",
      [](int64_t batch, int64_t rows, int64_t tokens, bool is_float, bool aligned, bool general,
         int64_t shared_limit) {
        return plans_of_match({batch, rows, is_float, aligned, general}, tokens, shared_limit);
      },
      "batch"_a, "rows"_a, "tokens"_a, "is_float"_a = false, "aligned"_a = true,
      "general"_a = false, "shared_limit"_a = kSharedLimit, "name -> {grid, block, shared_bytes}");
  m.def("plan_connected_components", &plans_of_components, "batch"_a, "tokens"_a,
        "name -> {grid, block, shared_bytes}");
  m.def("plan_kmeans", &plans_of_kmeans, "batch"_a, "tokens"_a, "clusters"_a,
        "name -> {grid, block, shared_bytes}");
  m.def(
      "plan_sinkhorn",
      [](int64_t batch, int64_t sources, int64_t anchors, int64_t channels, bool is_float,
         bool aligned) {
        const bool is_async = aligned && !is_float;
        return py::dict(
            "costs"_a = describe(plan_sinkhorn_costs(batch, sources, is_float, is_async)),
            "steps"_a = describe(plan_sinkhorn(batch)),
            "aggregation"_a = describe(plan_sinkhorn_aggregation(batch, anchors, channels)),
            "norms"_a = describe(plan_sinkhorn_norms(batch * (sources + anchors))),
            "weights"_a = describe(plan_sinkhorn_weights(batch, sources, anchors)),
            "sources"_a = describe(plan_sinkhorn_gradient(batch, sources, channels, true)),
            "anchors"_a = describe(plan_sinkhorn_gradient(batch, anchors, channels, false)));
      },
      "batch"_a, "sources"_a, "anchors"_a, "channels"_a, "is_float"_a = false, "aligned"_a = true,
      "name -> {grid, block, shared_bytes}");
  m.def(
      "plan_linear_assignment",
      [](int64_t batch, int64_t rows, int64_t columns) {
        const bool tall = rows > columns;
        return py::dict("assignment"_a = describe(
                            plan_assignment(batch, tall ? columns : rows, tall ? rows : columns)));
      },
      "batch"_a, "rows"_a, "columns"_a, "name -> {grid, block, shared_bytes}");
  m.def("plan_ema_scan", &plans_of_ema_scan, "batch"_a, "channels"_a,
        "name -> {grid, block, shared_bytes}");
  m.def("plan_dpc_knn", &plans_of_dpc_knn, "batch"_a, "tokens"_a, "clusters"_a, "is_float"_a,
        "aligned"_a, "name -> {grid, block, shared_bytes}");
  m.def("plan_greedy_select", &plans_of_greedy, "batch"_a, "tokens"_a, "channels"_a,
        "name -> {grid, block, shared_bytes}");
  m.def("plan_merge", &plans_of_merge, "batch"_a, "tokens"_a, "num_out"_a,
        "name -> {grid, block, shared_bytes}");
  m.def(
      "plan_attention",
      [](int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t queries, int64_t keys,
         int64_t head_dim, int64_t value_dim, bool is_float, int64_t shared_limit) {
        return plans_of_attention(
            {batch, heads_q, heads_kv, queries, keys, head_dim, value_dim, is_float}, shared_limit);
      },
      "batch"_a, "heads_q"_a, "heads_kv"_a, "queries"_a, "keys"_a, "head_dim"_a, "value_dim"_a,
      "is_float"_a = false, "shared_limit"_a = kSharedLimit, "name -> {grid, block, shared_bytes}");
  m.def(
      "plan_decode",
      [](int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t queries, int64_t keys,
         int64_t head_dim, int64_t value_dim, bool is_float, int64_t list_heads, int64_t length,
         int64_t block_q, int64_t shared_limit) {
        const AttentionShape shape{batch, heads_q,  heads_kv,  queries,
                                   keys,  head_dim, value_dim, is_float};
        if (list_heads == 0) return plans_of_lists(dense_list(shape), shared_limit);
        return plans_of_lists({shape, list_heads, length, block_q < queries ? block_q : queries},
                              shared_limit);
      },
      "batch"_a, "heads_q"_a, "heads_kv"_a, "queries"_a, "keys"_a, "head_dim"_a, "value_dim"_a,
      "is_float"_a = false, "list_heads"_a = 0, "length"_a = 0, "block_q"_a = 1,
      "shared_limit"_a = kSharedLimit,
      "Of one launch each: plans (name -> {grid, block, shared_bytes}), items, split_length and "
      "workspace_bytes; without list_heads (Hkv or Hq), of dense attention.");
  m.def(
      "plan_score",
      [](int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t queries, int64_t keys,
         int64_t head_dim, bool is_float) {
        return plans_of_score({batch, heads_q, heads_kv, queries, keys, head_dim, is_float});
      },
      "batch"_a, "heads_q"_a, "heads_kv"_a, "queries"_a, "keys"_a, "head_dim"_a,
      "is_float"_a = false, "name -> {grid, block, shared_bytes}");
  m.def(
      "plan_packing",
      [](int64_t heads, int64_t tokens, int64_t head_dim, int64_t group_size, bool along_tokens,
         int64_t window) {
        const auto axis = along_tokens ? GroupAxis::token : GroupAxis::channel;
        return plans_of_packing({head_dim, group_size, 4, axis, PackScheme::asymmetric, false},
                                heads, tokens, window);
      },
      "heads"_a, "tokens"_a, "head_dim"_a, "group_size"_a, "along_tokens"_a = false, "window"_a = 0,
      "name -> {grid, block, shared_bytes}; heads are counted over the batch.");
  m.def(
      "plan_packed_attention",
      [](int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t queries, int64_t keys,
         int64_t head_dim, int64_t bits, int64_t group_size, bool is_float, int64_t shared_limit) {
        const PackFormat f{head_dim,
                           group_size,
                           static_cast<int32_t>(bits),
                           GroupAxis::channel,
                           PackScheme::asymmetric,
                           false};
        return plans_of_packed_attention(
            {batch, heads_q, heads_kv, queries, keys, head_dim, head_dim, is_float}, f,
            shared_limit);
      },
      "batch"_a, "heads_q"_a, "heads_kv"_a, "queries"_a, "keys"_a, "head_dim"_a, "bits"_a = 4,
      "group_size"_a = 16, "is_float"_a = false, "shared_limit"_a = kSharedLimit,
      "Of one launch each: plans (name -> {grid, block, shared_bytes}), items and "
      "workspace_bytes.");
  m.def(
      "plan_unmerged_attention",
      [](int64_t batch, int64_t heads, int64_t positions, int64_t tokens, int64_t head_dim) {
        return py::dict("rows"_a = describe(plan_unmerged_attention(
                            batch * heads, positions, unmerged_dim(head_dim, head_dim))),
                        "list_queries"_a = describe(plan_list_queries(batch)),
                        "mean"_a = describe(plan_mean_of_queries(batch * heads * tokens)));
      },
      "batch"_a, "heads"_a, "positions"_a, "tokens"_a, "head_dim"_a,
      "name -> {grid, block, shared_bytes}");
  m.def(
      "plan_linear_attention",
      [](int64_t batch, int64_t heads, int64_t head_dim, int64_t value_dim) {
        return py::dict(
            "chunks"_a = describe(plan_linear_attention(batch * heads, head_dim, value_dim)),
            "step"_a = describe(plan_linear_step(batch * heads, value_dim)));
      },
      "batch"_a, "heads"_a, "head_dim"_a, "value_dim"_a, "name -> {grid, block, shared_bytes}");
  m.def("plan_topk", &plans_of_topk, "lists"_a, "columns"_a, "k"_a, "has_top_p"_a = false,
        "name -> {grid, block, shared_bytes}");
  m.def("plan_rows", &plans_of_rows, "rows"_a, "columns"_a, "name -> {grid, block, shared_bytes}");
}
