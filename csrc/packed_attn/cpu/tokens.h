// Blocks of up to kGather tokens on one side of a cache: where they lie, and how they are brought
// closer before they are needed.
#pragma once

#include "attention/cpu/gather.h"
#include "packed_attn/cpu/side.h"

namespace tokred::TOKRED_ISA {

// Rows of codes that are equally far apart, and rows anywhere.
struct TokenRun {
  const uint8_t* first;
  int64_t stride;
  const uint8_t* row(int64_t i) const { return first + i * stride; }
};
struct TokenList {
  const TokenAddress* at;
  const uint8_t* row(int64_t i) const { return at[i].row; }
};

// Where the tokens of a block lie.
struct BlockAddresses {
  int64_t count = 0;
  bool packed = true;  // none lies in the window
  bool run = false;  // kGather packed tokens, equally far apart from at[0] on; no others are in at
  int64_t row_stride = 0, params_stride = 0;  // of a run
  TokenAddress at[kGather + kLanes];  // valid up to whole_lanes(count)

  // `tokens` of them are in at.
  void finish(int64_t tokens) {
    count = tokens;
    packed = true;
    run = false;
    for (int64_t i = 0; i < count; ++i) packed = packed && at[i].params;
    for (int64_t i = count; count > 0 && i < count + kLanes; ++i) at[i] = at[count - 1];
  }
  // Tokens that side.packed_run() counted.
  void take_run(const SideView& side, int64_t token, int64_t tokens) {
    run = tokens == kGather && side.format.axis == GroupAxis::channel;
    if (!run) {
      for (int64_t i = 0; i < tokens; ++i) at[i] = side.packed_address(token + i);
      return finish(tokens);
    }
    count = tokens;
    packed = true;
    at[0] = side.packed_address(token);
    row_stride = side.row_stride();
    params_stride = side.params_stride();
  }

  TokenAddress operator[](int64_t i) const {
    if (!run) return at[i];
    return {at[0].row + i * row_stride, at[0].params + i * params_stride};
  }
  // f(the rows of codes from `first` on), as TokenRun or TokenList.
  template <class F>
  void visit_rows_of_codes(int64_t first, const F& f) const {
    if (run) return f(TokenRun{at[0].row + first * row_stride, row_stride});
    f(TokenList{at + first});
  }
  // The first token from i on whose params are not those of i.
  int64_t group_end(int64_t i) const {
    int64_t end = i + 1;
    while (end < count && (*this)[end].params == (*this)[i].params) ++end;
    return end;
  }
};

// The cache lines of a block, prefetched a few at a time: in a burst they would wait for each
// other, and everything for them.
class TokenPrefetcher {
 public:
  TokenPrefetcher() = default;
  TokenPrefetcher(const BlockAddresses& block, const PackFormat& f)
      : block_(&block), row_bytes_(code_bytes(f.head_dim, f.bits)),
        params_bytes_(2 * params_per_row(f)), pieces_(2 * block.count) {
    if (block.run && block.row_stride == row_bytes_ && 2 * block.params_stride == params_bytes_) {
      // Two pieces, as if it were one token.
      row_bytes_ *= kGather;
      params_bytes_ *= kGather;
      pieces_ = 2;
    }
  }

  // What is left is to be spread over so many steps.
  void spread(int64_t steps) {
    const int64_t lines = (pieces_ - piece_ + 1) / 2 *
                          (divide_up(row_bytes_, kLine) + divide_up(params_bytes_, kLine));
    lines_a_step_ = divide_up(lines, max(steps, 1));
  }
  void step() { prefetch(lines_a_step_); }
  void rest() { prefetch(INT64_MAX); }

 private:
  static constexpr int64_t kLine = 64;
  const BlockAddresses* block_ = nullptr;
  const uint8_t *next_ = nullptr, *end_ = nullptr;  // in a piece: a row of codes, or of params
  int64_t row_bytes_ = 0, params_bytes_ = 0;
  int64_t piece_ = 0, pieces_ = 0;
  int64_t lines_a_step_ = 0;

  void prefetch(int64_t lines) {
    const uint8_t* next = next_;
    for (; lines > 0; --lines, next += kLine) {
      while (next >= end_) {
        if (piece_ == pieces_) return;
        next = next_piece();
      }
      __builtin_prefetch(next);
    }
    next_ = next;
  }
  const uint8_t* next_piece() {
    const TokenAddress token = (*block_)[piece_ / 2];
    const bool params = piece_++ % 2;
    const auto* first = params ? reinterpret_cast<const uint8_t*>(token.params) : token.row;
    end_ = first + (params ? params_bytes_ : row_bytes_);
    return first - reinterpret_cast<uintptr_t>(first) % kLine;
  }
};

}  // namespace tokred::TOKRED_ISA
