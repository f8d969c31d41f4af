// packed_attention on the CPU. For few queries, and over lists of tokens, it multiplies codes as
// they are and is bound by arithmetic, not by memory: with four query heads a token of 128 channels
// takes 128 multiply-adds of eight lanes in f32, as in full precision, or 64 of pairs in fixed
// point, and in four bits it is 144 bytes. For many queries blocks of tokens are unpacked next to
// the core that multiplies them, once for up to 128 query rows.
#include "attention/cpu/prefill.h"
#include "attention/cpu/splits.h"
#include "common/cpu/hadamard.h"
#include "packed_attn/cpu/keys.h"
#include "packed_attn/cpu/values.h"

namespace tokred::TOKRED_ISA {
namespace {

// ---- Few queries, or lists ----------------------------------------------------------------------

ListRows item_rows(const AttentionParams& p, const ListRows& rows) {
  ListRows at = rows;
  at.end_key = p.keys;
  return at;
}

// Entries of a list with their addresses.
struct PackedKeyBatch : KeyBatch<float> {
  BlockAddresses k, v;

  int64_t choose(const AttentionParams& p, const ListRows& at, const RowVisibility& visibility,
                 const SideView& keys, const SideView& values, int64_t first, int64_t end) {
    if (!at.indices && !p.key_bias && visibility.hides_nothing()) {
      const int64_t most = min(min(end, p.keys) - first, kGather);
      count = min(keys.packed_run(first, most), values.packed_run(first, most));
      if (count > 0) {
        plain = seen_by_all = true;
        k.take_run(keys, first, count);
        v.take_run(values, first, count);
        return first + count;
      }
    }
    first = KeyBatch<float>::choose(p, at, visibility, first, end, [&](int64_t token, int64_t i) {
      return keys.find(token, k.at[i]) && values.find(token, v.at[i]);
    });
    k.finish(count);
    v.finish(count);
    return first;
  }
  // See GatheredKeys::prefetch_pages().
  void prefetch_pages() const {
    for (int64_t i = 0; i < count; ++i) {
      prefetch_line(k.at[i].row);
      prefetch_line(v.at[i].row);
    }
  }
};

struct PackedForward {
  const AttentionParams p;
  const ListRows at;
  const RowVisibility visibility;
  const SideView keys, values;
  PackedQuery<kMaxRows> query;
  PackedSums<kMaxRows> sums;
  Partial<float> result;
  alignas(64) float weights[kMaxRows * kGather];
  alignas(64) float shrink[kMaxRows];

  PackedForward(const PackedAttentionParams& s, const ListRows& rows, const Partial<float>& partial,
                bool skip_zeros)
      : p(item_params(s, rows.batch)), at(item_rows(p, rows)), visibility(p, at),
        keys(s.k, p.k, s.slots, p.dtype, p.keys, at.batch, at.kv_head),
        values(s.v, p.v, s.slots, p.dtype, p.keys, at.batch, at.kv_head),
        query(keys, !at.indices, at.rows),
        sums(values, !at.indices, at.rows, partial.out, skip_zeros), result(partial) {
    visit_f32(p.dtype, [&]<class T>() { load_queries<T>(); });
    query.start(static_cast<float>(p.scale));
    result.clear();
  }

  template <class T>
  void load_queries() {
    const auto rows = query_rows<const T>(p.q, at.batch, at.list_head, at.heads);
    for (int64_t row = 0; row < at.rows; ++row) {
      float* to = query.natural + row * p.head_dim;
      pack_row(rows[at.first_row + row], p.head_dim, to);
      if (keys.format.rotated) rotate_row(to, p.head_dim);
    }
  }

  // The entries [entry, end).
  void run(int64_t entry, int64_t end) {
    PackedKeyBatch blocks[2];
    PackedKeyBatch *block = &blocks[0], *next = &blocks[1];
    entry = block->choose(p, at, visibility, keys, values, entry, end);
    TokenPrefetcher(block->k, keys.stored).rest();
    while (block->count > 0) {
      entry = next->choose(p, at, visibility, keys, values, entry, end);
      if (at.indices) next->prefetch_pages();
      query.dot(block->k, weights, TokenPrefetcher(block->v, values.stored));
      block->finish_logits(visibility, at.rows, p.softcap, weights);
      exponentiate(at.rows, block->count, weights, shrink, result);
      sums.add(block->v, weights, shrink, TokenPrefetcher(next->k, keys.stored));
      PackedKeyBatch* done = block;
      block = next;
      next = done;
    }
    sums.finish();
  }
};

void run_split(const PackedAttentionParams& s, const ListRows& at, int64_t split,
               const Partial<float>& result) {
  const int64_t entry = split * kKeySplit, end = min(entry + kKeySplit, s.lists.length);
  PackedForward(s, at, result, false).run(entry, end);
  if (any_nan(result.out, at.rows * result.stride)) {
    PackedForward(s, at, result, true).run(entry, end);
  }
}

template <class T>
void write_result(const PackedAttentionParams& s, const ListRows& at,
                  const Partial<float>& result) {
  const AttentionParams& p = s.attention;
  const auto out_rows = query_rows<T>(p.out_view(), at.batch, at.list_head, at.heads);
  const auto lse_rows = query_rows<float>(contiguous(p.lse, p.heads_q, p.queries, 1), at.batch,
                                          at.list_head, at.heads);
  for (int64_t row = 0; row < at.rows; ++row) {
    const float total = result.total[row];
    float* sum = result.out + row * result.stride;
    if (s.v.packed.format.rotated) rotate_row(sum, p.value_dim);
    for (int64_t c = 0; c < p.value_dim; c += kLanes) {
      store_as(out_rows[at.first_row + row] + c,
               total == 0 ? splat(0.0f) : load(sum + c) / splat(total));
    }
    *lse_rows[at.first_row + row] =
        total == 0 ? -kInfinity<float> : result.top[row] + std::log(total);
  }
}

// ---- Many queries -------------------------------------------------------------------------------

bool in_panels(const PackedAttentionParams& s) {
  const bool all = !s.lists.indices && s.lists.length == s.attention.keys;
  return all && !is_decode(s.attention);
}

// rotate_row() of sixteen rows, the lanes of [dim][16].
void rotate_panel(float* panel, int64_t dim) {
  const int64_t size = hadamard_size(dim);
  for (int64_t step = 1; step < size; step *= 2) {
    for (int64_t d = 0; d < dim; ++d) {
      if (d & step) continue;
      float *low = panel + d * kLanes, *high = low + step * kLanes;
      const f32x16 a = load(low), b = load(high);
      store(low, a + b);
      store(high, a - b);
    }
  }
  const f32x16 scale = splat(inverse_root(size));
  for (int64_t i = 0; i < dim * kLanes; i += kLanes) store(panel + i, load(panel + i) * scale);
}

// The tokens of one kv head.
struct PackedTokens {
  const SideView k, v;

  template <class T>
  int64_t choose(KeyBlock<T>& block, const AttentionParams& p, const Visibility& see, int64_t item,
                 int64_t kv_head, int64_t token, int64_t end) const {
    return block.choose(p, see, item, kv_head, token, end, [&](int64_t i) {
      TokenAddress address;
      return !k.find(i, address) || !v.find(i, address);
    });
  }
  template <class T>
  void pack(KeyBlock<T>& block, const AttentionParams& p, int64_t item, int64_t kv_head) const {
    for (int64_t i = 0; i < block.count; ++i) {
      block.bias[i] = key_bias<float>(p, item, kv_head, block.index[i]);
      TokenAddress address;
      if (k.find(block.index[i], address)) unpack_token(k, address, block.k + i * p.head_dim);
      if (v.find(block.index[i], address)) unpack_token(v, address, block.v + i * p.value_dim);
    }
  }
  void rotate_query(float* panel, int64_t dim) const {
    if (k.format.rotated) rotate_panel(panel, dim);
  }
  void rotate_out(float* panel, int64_t dim) const {
    if (v.format.rotated) rotate_panel(panel, dim);
  }
};

void packed_attention_panels(const PackedAttentionParams& s, const Parallel& parallel) {
  visit_f32(s.attention.dtype, [&]<class T>() {
    each_task(s.attention, parallel,
              [&](int64_t item, int64_t head, int64_t group, int64_t row, int64_t end) {
                const AttentionParams p = item_params(s, item);
                const PackedTokens tokens{SideView(s.k, p.k, s.slots, p.dtype, p.keys, item, head),
                                          SideView(s.v, p.v, s.slots, p.dtype, p.keys, item, head)};
                Forward<T, PackedTokens>(tokens, p, item, head, group, row, end).run();
              });
  });
}

}  // namespace

int64_t packed_attention_workspace(const PackedAttentionParams& s, const Parallel& parallel) {
  return in_panels(s) ? 0 : split_workspace<float>(s.attention, s.lists, parallel);
}

void packed_attention(const PackedAttentionParams& s, const Parallel& parallel) {
  if (in_panels(s)) return packed_attention_panels(s, parallel);
  run_splits<float>(
      s.attention, s.lists, parallel,
      [&](const ListRows& at, int64_t split, const Partial<float>& result) {
        run_split(s, at, split, result);
      },
      [&](const ListRows& at, const Partial<float>& result) {
        visit_f32(s.attention.dtype, [&]<class T>() { write_result<T>(s, at, result); });
      });
}

}  // namespace tokred::TOKRED_ISA
