// Carves a kernel's workspace into arrays, each aligned to a cache line. The same function that
// carves measures: carve an empty Workspace, and bytes() says how large the real one must be.
#pragma once

#include "common/cpu/sizes.h"

namespace tokred::TOKRED_ISA {

class Workspace {
 public:
  // Null: only measures.
  explicit Workspace(void* memory = nullptr)
      : next_(reinterpret_cast<int64_t>(aligned(memory))), start_(next_) {}

  template <class T>
  T* allocate(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += aligned(count * static_cast<int64_t>(sizeof(T)));
    return array;
  }
  // What all arrays need, wherever the memory starts. Of two arrays of 10 floats: 3 * 64.
  int64_t bytes() const { return next_ - start_ + kAlign; }

 private:
  int64_t next_, start_;
};

// The bytes that carve(workspace) needs; a multiple of kAlign.
template <class Carve>
int64_t workspace_bytes(const Carve& carve) {
  Workspace workspace;
  carve(workspace);
  return workspace.bytes();
}

}  // namespace tokred::TOKRED_ISA
