// What the benchmarks call of ggml: packing rows, and decode attention on packed keys and values in
// its best layout, every head's rows side by side.
#include <cstring>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Attention {
  ggml_context* context;
  ggml_cgraph* graph;
  ggml_tensor *query, *key, *value, *out;
  ggml_cplan plan;
  std::vector<uint8_t> work;
};

}  // namespace

extern "C" {

// Rows of `columns` f32 as rows of `type` (2 is q4_0, 8 is q8_0), and back.
size_t peer_pack(int type, const float* x, void* rows, int64_t count, int64_t columns) {
  return ggml_quantize_chunk(static_cast<ggml_type>(type), x, rows, 0, count, columns, nullptr);
}
void peer_unpack(int type, const void* rows, float* x, int64_t numbers) {
  ggml_get_type_traits(static_cast<ggml_type>(type))->to_float(rows, x, numbers);
}
size_t peer_row_bytes(int type, int64_t columns) {
  return ggml_row_size(static_cast<ggml_type>(type), columns);
}

// One query of heads_q heads against `tokens` packed keys and values of heads_kv heads.
Attention* peer_attention(int type, int64_t heads_q, int64_t heads_kv, int64_t head_dim,
                          int64_t tokens, float scale, int threads) {
  const auto packed = static_cast<ggml_type>(type);
  const size_t cache = 2 * ggml_row_size(packed, head_dim) * tokens * heads_kv;
  ggml_init_params params{cache + (64 << 20), nullptr, false};
  auto* a = new Attention{};
  a->context = ggml_init(params);
  a->query = ggml_new_tensor_4d(a->context, GGML_TYPE_F32, head_dim, 1, heads_q, 1);
  a->key = ggml_new_tensor_4d(a->context, packed, head_dim, tokens, heads_kv, 1);
  a->value = ggml_new_tensor_4d(a->context, packed, head_dim, tokens, heads_kv, 1);
  a->out = ggml_flash_attn_ext(a->context, a->query, a->key, a->value, nullptr, scale, 0, 0);
  a->graph = ggml_new_graph(a->context);
  ggml_build_forward_expand(a->graph, a->out);
  a->plan = ggml_graph_plan(a->graph, threads, nullptr);
  a->work.resize(a->plan.work_size);
  a->plan.work_data = a->work.data();
  return a;
}
void* peer_key(Attention* a) { return a->key->data; }
void* peer_value(Attention* a) { return a->value->data; }

// query and out [heads_q][head_dim].
void peer_attend(Attention* a, const float* query, float* out) {
  std::memcpy(a->query->data, query, ggml_nbytes(a->query));
  ggml_graph_compute(a->graph, &a->plan);
  std::memcpy(out, a->out->data, ggml_nbytes(a->out));
}
void peer_free(Attention* a) {
  ggml_free(a->context);
  delete a;
}

}  // extern "C"
