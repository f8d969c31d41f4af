// Params of the kernels over packed keys and values.
#pragma once

#include "attention/score_params.h"
#include "kv_pack/params.h"

namespace tokred {

// Keys or values: a packed part, then a window in full precision (AttentionParams::k and v,
// QkScoreParams::k). With `ring` the first packed_tokens() of an item's tokens are packed, and
// token t of the others lies in row t % window_rows of the window; without, all packed rows are
// tokens, and the window's rows follow them in order.
struct PackedSide {
  PackedRows packed;
  int64_t window_rows;                 // 0 where there is no window
  bool ring;
};

// Attention as AttentionParams has it (no positions, no block mask) over the tokens of an item:
// keys of them, or lengths[b] <= keys. Causal aligns the last query with the item's last token.
// With lists.indices the tokens of a list only; see KeyLists. Rotated sides: the query is rotated
// for the logits of K, the sum of values is rotated back.
struct PackedAttentionParams {
  AttentionParams attention;           // k, v: windows [B, Hkv, W, D | Dv] or null; keys: T
  PackedSide k, v;
  SlotTable slots;                     // of both
  const int32_t* lengths;              // i32 [B] or null; outside [0, T] they are clamped
  int64_t lengths_stride;
  KeyLists lists;                      // indices null: all tokens; else block_q is 1 or L
};

// Scores as QkScoreParams has them, without dims; lengths are those of the items.
struct PackedScoreParams {
  QkScoreParams score;  // k: the window [B, Hkv, W, D] or null; keys: T; slots null
  PackedSide k;
  SlotTable slots;
};

}  // namespace tokred
