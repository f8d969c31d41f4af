// Whether tensors share memory: an output of an op may overlap neither itself nor another tensor.
#pragma once

#include <initializer_list>
#include <numeric>
#include <optional>

#include "tensor.h"

namespace tokred {

// The bytes of a tensor: nested runs that repeat at strides, the shortest stride first.
class Memory {
 public:
  explicit Memory(const Tensor& t) : first_(reinterpret_cast<uintptr_t>(t.const_data_ptr())) {
    const auto element = static_cast<int64_t>(t.element_size());
    TOKRED_CHECK(t.dim() <= kMaxDims, "tensors may have at most 8 dimensions, got shape ",
                 shape_string(t));
    empty_ = t.numel() == 0;
    for (int64_t i = 0; i < t.dim(); ++i) {
      if (t.size(i) <= 1) continue;
      const int64_t stride = t.stride(i) * element;
      int at = count_++;
      for (; at > 0 && dims_[at - 1].stride > stride; --at) dims_[at] = dims_[at - 1];
      dims_[at] = {stride, t.size(i)};
    }
    extent_[0] = element;
    for (int i = 0; i < count_; ++i) {
      extent_[i + 1] = extent_[i] + dims_[i].stride * (dims_[i].size - 1);
    }
  }

  // Exact where dimensions nest, as those of every view of a dense tensor do.
  bool overlaps_itself() const {
    for (int i = 0; i < count_; ++i) {
      if (!empty_ && dims_[i].stride < extent_[i]) return true;
    }
    return false;
  }

  // Tells rows that interleave apart: from some stride on, both tensors are runs that repeat at
  // multiples of one distance, within which the runs do not meet.
  bool overlaps(const Memory& other) const {
    if (empty_ || other.empty_ || first_ >= other.end() || other.first_ >= end()) return false;
    for (int i = 0; i <= count_; ++i) {
      for (int j = 0; j <= other.count_; ++j) {
        const int64_t distance = std::gcd(step(i), other.step(j));
        if (distance == 0) continue;  // two whole runs, which meet
        int64_t ahead = static_cast<int64_t>(other.first_ - first_) % distance;
        if (ahead < 0) ahead += distance;
        if (ahead >= extent_[i] && ahead + other.extent_[j] <= distance) return false;
      }
    }
    return true;
  }

 private:
  static constexpr int kMaxDims = 8;
  struct Dim {
    int64_t stride, size;  // the stride in bytes; sizes above 1
  };

  uintptr_t end() const { return first_ + static_cast<uintptr_t>(extent_[count_]); }
  // The common divisor of the strides from dimension i on.
  int64_t step(int i) const {
    int64_t common = 0;
    for (; i < count_; ++i) common = std::gcd(common, dims_[i].stride);
    return common;
  }

  uintptr_t first_;
  bool empty_;
  int count_ = 0;
  Dim dims_[kMaxDims];            // by stride
  int64_t extent_[kMaxDims + 1];  // bytes from the first to the last of the first i dimensions
};

// A tensor and its bytes by the name of its argument; null where an optional one is absent.
struct Named {
  Named(const char* argument, const Tensor& t) : name(argument), tensor(&t), memory(t) {}
  Named(const char* argument, const OptionalTensor& t) : name(argument) {
    if (!t) return;
    tensor = &*t;
    memory.emplace(*t);
  }
  const char* name;
  const Tensor* tensor = nullptr;
  std::optional<Memory> memory;
};

// Refuses outputs that share memory with themselves or with another argument.
inline void check_overlaps(std::initializer_list<Named> written,
                           std::initializer_list<Named> read) {
  for (const Named* out = written.begin(); out != written.end(); ++out) {
    if (!out->memory) continue;
    TOKRED_CHECK(!out->memory->overlaps_itself(), out->name,
                 " must not overlap itself, got strides ", strides_string(*out->tensor),
                 " for shape ", shape_string(*out->tensor));
    const auto check = [&](const Named& other) {
      TOKRED_CHECK(!other.memory || !out->memory->overlaps(*other.memory), out->name,
                   " must not share memory with ", other.name, ", and does");
    };
    for (const Named* other = written.begin(); other != out; ++other) check(*other);
    for (const Named& other : read) check(other);
  }
}

}  // namespace tokred
