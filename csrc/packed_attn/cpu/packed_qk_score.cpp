// packed_qk_score on the CPU: a task scores a chunk of tokens for all query heads of a kv head, so
// their codes are read once.
#include "attention/cpu/head_scores.h"
#include "common/cpu/hadamard.h"
#include "packed_attn/cpu/keys.h"

namespace tokred::TOKRED_ISA {
namespace {

int64_t tokens_of(const QkScoreParams& p, int64_t item) {
  return item_length(p.lengths, p.lengths_stride, item, p.keys);
}
SideView side_of(const PackedScoreParams& s, int64_t item, int64_t kv_head) {
  const QkScoreParams& p = s.score;
  return SideView(s.k, p.k, s.slots, p.dtype, tokens_of(p, item), item, kv_head);
}

// Visible::offset are the tokens themselves.
Visible visible_tokens(const PackedScoreParams& s, int64_t item, int64_t first) {
  const QkScoreParams& p = s.score;
  const SideView side = side_of(s, item, 0);
  const int64_t length = tokens_of(p, item);
  return Visible(
      min(p.keys - first, kScoreChunk),
      [&](int64_t i) -> int64_t {
        const int64_t token = first + i;
        if (token >= length) return -1;
        if (p.mask && !p.mask[item * p.mask_stride_batch + token * p.mask_stride_token]) return -1;
        TokenAddress address;
        return side.find(token, address) ? token : -1;
      },
      1);
}

struct PackedScorer {
  const PackedScoreParams& s;
  const QueryRows& query_rows;
  const int64_t item, first;
  const Visible visible;

  int64_t rows() const { return query_rows.rows; }
  float* out(int64_t head, int64_t heads) const {
    return s.score.out + (item * heads + head) * s.score.keys + first;
  }
  void score(int64_t kv_head, int64_t row, int64_t count, float* scores) const {
    const SideView side = side_of(s, item, kv_head);
    PackedQuery<kScoreRows> query(side, true, count);
    copy_bytes(query.natural, query_rows.row(s.score, item, kv_head, row),
               4 * count * query_rows.stride);
    query.start(1);
    alignas(64) float logits[kScoreRows * kGather];
    BlockAddresses blocks[2];
    find_block(side, 0, blocks[0]);
    for (int64_t i = 0; i < visible.count; i += kGather) {
      const BlockAddresses& block = blocks[i / kGather % 2];
      BlockAddresses& next = blocks[1 - i / kGather % 2];
      find_block(side, i + kGather, next);
      query.dot(block, logits, TokenPrefetcher(next, side.stored));
      for (int64_t r = 0; r < count; ++r) {
        copy_bytes(scores + r * kScoreChunk + i, logits + r * kGather, 4 * block.count);
      }
    }
  }

 private:
  // The addresses of up to kGather visible tokens from the i-th on.
  void find_block(const SideView& side, int64_t i, BlockAddresses& block) const {
    const int64_t tokens = max(min(visible.count - i, kGather), 0);
    if (tokens > 0 && visible.offset[i + tokens - 1] == visible.offset[i] + tokens - 1 &&
        side.packed_run(visible.offset[i], tokens) == tokens) {
      return block.take_run(side, visible.offset[i], tokens);
    }
    for (int64_t j = 0; j < tokens; ++j) side.find(visible.offset[i + j], block.at[j]);
    block.finish(tokens);
  }
};

template <class T>
void pack_queries(const PackedScoreParams& s, const QueryRows& query_rows,
                  const Parallel& parallel) {
  const QkScoreParams& p = s.score;
  parallel_tasks(parallel, p.batch * p.heads_kv * query_rows.rows, [&](int64_t task, int64_t) {
    const int64_t row = task % query_rows.rows, head = task / query_rows.rows;
    const int64_t item = head / p.heads_kv, kv_head = head % p.heads_kv;
    pack_query<T>(p, query_rows, item, kv_head, row);
    if (s.k.packed.format.rotated) rotate_row(query_rows.row(p, item, kv_head, row), p.head_dim);
  });
}

}  // namespace

int64_t packed_qk_score_workspace(const PackedScoreParams& s, const Parallel&) {
  const QkScoreParams& p = s.score;
  return workspace_bytes([&](Workspace& workspace) {
    QueryRows(p, workspace);
    if (p.reduction == HeadReduction::softmax_vote) Vote(workspace, p.batch, p.heads_q, p.keys);
  });
}

void packed_qk_score(const PackedScoreParams& s, const Parallel& parallel) {
  const QkScoreParams& p = s.score;
  Workspace workspace(p.workspace);
  const QueryRows query_rows(p, workspace);
  visit_f32(p.dtype, [&]<class T>() { pack_queries<T>(s, query_rows, parallel); });
  const Vote votes(workspace, p.batch, p.heads_q, p.keys);
  const int64_t chunks = divide_up(p.keys, kScoreChunk);
  const int64_t heads = p.reduction == HeadReduction::head_mean ? 1 : p.heads_kv;
  parallel_tasks(parallel, p.batch * heads * chunks, [&](int64_t task, int64_t) {
    const int64_t chunk = task % chunks, item = task / (chunks * heads);
    const int64_t first = chunk * kScoreChunk;
    const PackedScorer scorer{s, query_rows, item, first, visible_tokens(s, item, first)};
    HeadReducer(scorer, p.heads_q, p.heads_kv)
        .reduce(p.reduction, task / chunks % heads, votes, item, chunk);
  });
  if (p.reduction == HeadReduction::softmax_vote) votes.count_votes(p.out, parallel);
}

}  // namespace tokred::TOKRED_ISA
