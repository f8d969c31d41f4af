// Blocks of up to kGather tokens on one side of a cache: where they lie, and their prefetch.
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
  bool run = false;    // kGather packed tokens, equally far apart
  bool tight = false;  // a run without gaps: of its tokens only the first is in at
  int64_t row_stride = 0, params_stride = 0;  // of a run
  TokenAddress at[kGather + kLanes];          // valid up to whole_lanes(count)

  // `tokens` of them are in at.
  void finish(int64_t tokens) {
    count = tokens;
    packed = true;
    run = tight = false;
    for (int64_t i = 0; i < count; ++i) packed = packed && at[i].params;
    for (int64_t i = count; count > 0 && i < count + kLanes; ++i) at[i] = at[count - 1];
  }
  // Tokens that side.packed_run() counted.
  void take_run(const SideView& side, int64_t token, int64_t tokens) {
    const PackFormat& f = side.format;
    row_stride = side.row_stride();
    params_stride = side.params_stride();
    const bool equally_far = tokens == kGather && f.axis == GroupAxis::channel;
    const bool no_gaps =
        row_stride == code_bytes(f.head_dim, f.bits) && params_stride == params_per_row(f);
    const int64_t listed = equally_far && no_gaps ? 1 : tokens;
    for (int64_t i = 0; i < listed; ++i) at[i] = side.packed_address(token + i);
    if (listed == tokens) finish(tokens);
    count = tokens;
    packed = true;
    run = equally_far;
    tight = equally_far && no_gaps;
  }

  TokenAddress operator[](int64_t i) const {
    if (!tight) return at[i];
    return {at[0].row + i * row_stride, at[0].params + i * params_stride};
  }
  // f(the rows of codes from `first` on), as TokenRun or TokenList.
  template <class F>
  void visit_rows_of_codes(int64_t first, const F& f) const {
    if (run) return f(TokenRun{at[0].row + first * row_stride, row_stride});
    f(TokenList{at + first});
  }
  // The first token from i on whose params are not those of i, along tokens.
  int64_t group_end(int64_t i) const {
    int64_t end = i + 1;
    while (end < count && at[end].params == at[i].params) ++end;
    return end;
  }
};

// The cache lines of a block, prefetched a few at a time: a burst would fill the queue of
// outstanding loads, and all other loads would wait for it.
class TokenPrefetcher {
 public:
  TokenPrefetcher() = default;
  TokenPrefetcher(const BlockAddresses& block, const PackFormat& f)
      : block_(&block), row_bytes_(code_bytes(f.head_dim, f.bits)), tokens_(block.count) {
    if (!block.tight) return;
    // The rows are bytes one after the other, and so are the params, of which there are few.
    tokens_ = 0;
    next_byte_ = block.at[0].row;
    end_byte_ = next_byte_ + kGather * row_bytes_;
    const auto* params = reinterpret_cast<const uint8_t*>(block.at[0].params);
    for (int64_t i = 0; i < 2 * params_per_row(f) * kGather; i += kLine) prefetch_line(params + i);
  }

  // Spreads what is left over so many steps.
  void spread(int64_t steps) {
    const bool by_token = tokens_ > 0;
    const int64_t left = by_token ? tokens_ - next_token_ : (end_byte_ - next_byte_) / kLine;
    step_ = divide_up(left, max(steps, 1)) * (by_token ? 1 : kLine);
  }
  void step() { prefetch(step_); }
  void rest() { prefetch(tokens_ > 0 ? tokens_ : end_byte_ - next_byte_); }

 private:
  static constexpr int64_t kLine = 64;
  const BlockAddresses* block_ = nullptr;
  int64_t row_bytes_ = 0;
  int64_t next_token_ = 0, tokens_ = 0;
  const uint8_t *next_byte_ = nullptr, *end_byte_ = nullptr;
  int64_t step_ = 0;  // tokens, or bytes

  void prefetch(int64_t count) {
    const int64_t bytes = min(count, end_byte_ - next_byte_);
    if (bytes > 0) {
      const uint8_t* byte = next_byte_;
      next_byte_ += bytes;
      for (; byte < next_byte_; byte += kLine) prefetch_line(byte);
      return;
    }
    const TokenAddress* next = block_->at + next_token_;
    next_token_ = min(next_token_ + count, tokens_);
    for (const TokenAddress* end = block_->at + next_token_; next < end; ++next) {
      const TokenAddress token = *next;
      for (int64_t byte = 0; byte < row_bytes_; byte += kLine) {
        prefetch_line(token.row + byte);
      }
      // Rows of records begin anywhere in a cache line.
      prefetch_line(token.row + row_bytes_ - 1);
      prefetch_line(token.params);
    }
  }
};

}  // namespace tokred::TOKRED_ISA
