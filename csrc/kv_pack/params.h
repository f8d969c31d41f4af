// Parameters of the kv_pack kernels.
#pragma once

#include "attention/params.h"
#include "kv_pack/layout.h"

namespace tokred {

// Codes and params of [B, H, S, D]; see kv_pack/layout.h. Strides in elements, the last dimension
// contiguous. With paging the batch is 1 and S the size of a pool.
struct PackedRows {
  uint8_t* codes;                      // u8 [B | 1, H, S, code_bytes(D, bits)]
  uint16_t* params;                    // f16 [B | 1, H, S or S / group_size, params_per_row]
  int64_t codes_stride_batch, codes_stride_head, codes_stride_token;
  int64_t params_stride_batch, params_stride_head, params_stride_row;
  int64_t rows;                        // S, a multiple of group_size along tokens
  PackFormat format;
  const int8_t* levels = nullptr;  // i8 [H, 2^bits] of a codebook, or null: gaussian_levels()
  int64_t levels_stride_head = 0;  // 0 where all heads share them
};

// Token t of item b lies in row t of PackedRows, or in row slots[b][t] where slots are given;
// tokens whose slot is outside [0, S) are neither written nor read. Along
// tokens a group of tokens takes the params row slots[b][first of the group] / group_size, so a
// page of a pool is a multiple of group_size slots in order.
struct SlotTable {
  const int32_t* data = nullptr;  // i32 [B, capacity], the last dimension contiguous, or null
  int64_t stride_batch = 0;
  int64_t capacity = 0;  // tokens an item may have: S without slots
};

// All rows of x, N = rows.
struct KvPackParams {
  HeadTensor x;  // [B, H, N, D]
  PackedRows packed;
  int64_t batch, heads;
  DType dtype;  // of x: f32, f16, bf16
};

struct KvUnpackParams {
  PackedRows packed;
  HeadTensor out;  // [B, H, N, D], written; tokens of a head without gaps
  int64_t batch, heads;
  DType dtype;  // of out
};

// Appends L tokens to a cache that holds T = lengths[b] (or length) tokens of item b; see
// packed_tokens(). First the tokens from packed_tokens(T) to packed_tokens(T + L) - 1 are packed,
// those below T from the window, the others from x; then the other new tokens are written to the
// window, rotated where the format is: tokens packed from the window were rounded to its dtype.
// Without a window every new token is packed.
// Where packed_tokens(T + L) is more than the capacity, or T is negative, nothing of the item is
// written.
struct KvAppendParams {
  HeadTensor x;  // [B, H, L, D]
  PackedRows packed;
  HeadTensor window;  // [B, H, W, D] in the dtype of x, written; or null
  int64_t window_rows;  // W; a multiple of group_size along tokens, 0 without
  SlotTable slots;
  const int32_t* lengths;  // i32 [B] or null
  int64_t lengths_stride, length;
  int64_t batch, heads, tokens;  // L
  DType dtype;
};

}  // namespace tokred
