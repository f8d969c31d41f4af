// packed_attention on the CPU for few queries, and over lists of tokens. It is bound by arithmetic,
// not by memory: with four query heads a token of 128 channels takes 128 multiply-adds of eight
// lanes in f32, as in full precision, or 64 of pairs in fixed point, and in four bits it is 144
// bytes.
#include "attention/cpu/decode.h"
#include "attention/cpu/splits.h"
#include "common/cpu/hadamard.h"
#include "packed_attn/cpu/keys.h"
#include "packed_attn/cpu/prefill.h"
#include "packed_attn/cpu/values.h"

namespace tokred::TOKRED_ISA {
namespace {

ListRows item_rows(const AttentionParams& p, const ListRows& rows) {
  ListRows at = rows;
  at.end_key = p.keys;
  return at;
}

// Entries of a list with their places.
struct PackedChosen : Chosen<float> {
  BlockPlaces k, v;

  int64_t choose(const AttentionParams& p, const ListRows& at, const RowSight& sight,
                 const SideView& keys, const SideView& values, int64_t first, int64_t end) {
    int64_t tokens = smaller(end, p.keys) - first;
    if (!at.indices && !p.key_bias && sight.hides_nothing() && tokens > 0 &&
        keys.find_run(first, smaller(tokens, kGather), k.at, tokens) &&
        values.find_run(first, tokens, v.at, tokens)) {
      count = tokens;
      plain = seen_by_all = true;
      k.finish_run(count);
      v.finish_run(count);
      return first + count;
    }
    first = Chosen<float>::choose(p, at, sight, first, end, [&](int64_t token, int64_t i) {
      return keys.find(token, k.at[i]) && values.find(token, v.at[i]);
    });
    k.finish(count);
    v.finish(count);
    return first;
  }
  // See Gathered::find_pages().
  void find_pages() const {
    for (int64_t i = 0; i < count; ++i) {
      __builtin_prefetch(k.at[i].row);
      __builtin_prefetch(v.at[i].row);
    }
  }
};

struct PackedForward {
  const AttentionParams p;
  const ListRows at;
  const RowSight sight;
  const SideView keys, values;
  PackedQuery<kMaxRows> query;
  PackedSums<kMaxRows> sums;
  Partial<float> result;
  alignas(64) float weights[kMaxRows * kGather];
  alignas(64) float shrink[kMaxRows];

  PackedForward(const PackedAttentionParams& s, const ListRows& rows, const Partial<float>& partial,
                bool careful)
      : p(item_params(s, rows.batch)), at(item_rows(p, rows)), sight(p, at),
        keys(s.k, p.k, s.slots, p.dtype, p.keys, at.batch, at.kv_head),
        values(s.v, p.v, s.slots, p.dtype, p.keys, at.batch, at.kv_head),
        query(keys, !at.indices, at.rows),
        sums(values, !at.indices, at.rows, partial.out, careful),
        result(partial) {
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
    PackedChosen blocks[2];
    PackedChosen *block = &blocks[0], *next = &blocks[1];
    entry = block->choose(p, at, sight, keys, values, entry, end);
    block->k.ahead(keys.format).take(block->count);
    while (block->count > 0) {
      entry = next->choose(p, at, sight, keys, values, entry, end);
      if (at.indices) next->find_pages();
      query.dot(block->k, weights, block->v.ahead(values.format));
      block->finish_logits(at.rows, weights);
      exponentiate(at.rows, block->count, weights, shrink, result);
      sums.add(block->v, weights, shrink, next->k.ahead(keys.format));
      PackedChosen* done = block;
      block = next;
      next = done;
    }
    sums.finish();
  }
};

void run_split(const PackedAttentionParams& s, const ListRows& at, int64_t split,
               const Partial<float>& result) {
  const int64_t entry = split * kSplit, end = smaller(entry + kSplit, s.lists.length);
  PackedForward(s, at, result, false).run(entry, end);
  if (any_nan(result.out, at.rows * result.stride)) {
    PackedForward(s, at, result, true).run(entry, end);
  }
}

template <class T>
void write_result(const PackedAttentionParams& s, const ListRows& at,
                  const Partial<float>& result) {
  const AttentionParams& p = s.attention;
  const HeadTensor out{p.out, p.out_stride_batch, p.out_stride_head, p.out_stride_token};
  const auto out_rows = query_rows<T>(out, at.batch, at.list_head, at.heads);
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

}  // namespace

int64_t packed_attention_workspace(const PackedAttentionParams& s, const Parallel& parallel) {
  return in_panels(s) ? 0 : split_workspace<float>(s.attention, s.lists, parallel);
}

void packed_attention(const PackedAttentionParams& s, const Parallel& parallel) {
  if (in_panels(s)) return packed_attention_panels(s, parallel);
  run_splits<float>(s.attention, s.lists, parallel,
                    [&](const ListRows& at, int64_t split, const Partial<float>& result) {
                      run_split(s, at, split, result);
                    },
                    [&](const ListRows& at, const Partial<float>& result) {
                      visit_f32(s.attention.dtype,
                                [&]<class T>() { write_result<T>(s, at, result); });
                    });
}

}  // namespace tokred::TOKRED_ISA
