// Addresses in the row views of the topk stem, and slices of its workspace.
#pragma once

#include "common/cpu/sizes.h"
#include "common/cpu/storage.h"
#include "topk/params.h"

namespace tokred::TOKRED_ISA {

// The first element of row r, or null where there is no such tensor.
template <class T>
TOKRED_INLINE const T* row_start(const RowView& view, int64_t r) {
  if (!view.data) return nullptr;
  const int64_t last = r % view.size[2], rest = r / view.size[2];
  return static_cast<const T*>(view.data) + rest / view.size[1] * view.stride[0] +
         rest % view.size[1] * view.stride[1] + last * view.stride[2];
}

// The number beside row r in [0, limit]; the limit where there is none.
TOKRED_INLINE int64_t row_number(const RowView& view, int64_t r, int64_t limit) {
  if (!view.data) return limit;
  const int64_t number = *row_start<int32_t>(view, r);
  return number < 0 ? 0 : number < limit ? number : limit;
}

// Rows that one task takes, so that tasks are not short.
TOKRED_INLINE int64_t rows_per_task(int64_t columns) {
  constexpr int64_t kElements = 32768;
  return columns < kElements ? kElements / (columns + 1) + 1 : 1;
}

// Hands out pieces of memory, each aligned to a cache line.
class Slices {
 public:
  explicit Slices(void* memory)
      : next_(reinterpret_cast<int64_t>(aligned(memory))), start_(next_) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += aligned(count * static_cast<int64_t>(sizeof(T)));
    return piece;
  }
  // Bytes that all pieces need, wherever the memory starts.
  int64_t bytes() const { return next_ - start_ + kAlign; }

 private:
  int64_t next_, start_;
};

}  // namespace tokred::TOKRED_ISA
