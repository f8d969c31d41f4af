// The C++ twins of csrc/common/cuda/ptx_sm90.cuh.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cuda/numbers.cuh"
#include "tensor_core.h"

namespace tokred::cuda {

// Shared memory begins somewhere, not where it would suit a kernel.
inline constexpr uint32_t kSharedStart = 0x410;
inline uint32_t shared_address(const void* p) {
  if (!simt::is_shared(p, 1)) simt::fail("an address outside shared memory");
  return kSharedStart + static_cast<uint32_t>(static_cast<const char*>(p) -
                                              static_cast<char*>(simt::shared_memory()));
}
inline const char* shared_pointer(uint32_t address) {
  const char* p = static_cast<char*>(simt::shared_memory()) + (int64_t{address} - kSharedStart);
  if (!simt::is_shared(p, 16)) simt::fail("wgmma reads outside shared memory");
  return p;
}

// Barriers ---------------------------------------------------------------------------------------

using Barrier = uint64_t;

struct BarrierBits {
  uint32_t expected : 31, parity : 1, pending;

  static BarrierBits of(const Barrier& barrier) {
    const auto bits = simt::bits<BarrierBits>(barrier);
    if (bits.expected > 1024) simt::fail("a barrier in shared memory without a count");
    return bits;
  }
};

// Whether a thread has waited for others to write without a fence before its next wgmma.
inline bool lacks_fence[1024];

inline void barrier_init(Barrier& barrier, int count) {
  const auto arrivals = static_cast<uint32_t>(count);
  barrier = simt::bits<Barrier>(BarrierBits{arrivals, 0, arrivals});
}
inline void count_arrival(Barrier& barrier) {
  BarrierBits bits = BarrierBits::of(barrier);
  if (--bits.pending == 0) {
    bits.parity ^= 1;
    bits.pending = bits.expected;
  }
  barrier = simt::bits<Barrier>(bits);
}
// Others go on at once, before this thread does.
inline void barrier_arrive(Barrier& barrier) {
  count_arrival(barrier);
  simt::wait_until([](void*) { return true; }, nullptr);
}
inline void barrier_arrive_after_copies(Barrier& barrier) {
  simt::copy_notify([](void* argument) { count_arrival(*static_cast<Barrier*>(argument)); },
                    &barrier);
}
inline void barrier_wait(Barrier& barrier, uint32_t parity) {
  struct Wait {
    const Barrier& barrier;
    uint32_t parity;
  } wait{barrier, parity};
  simt::wait_until(
      [](void* argument) {
        const Wait& wait = *static_cast<Wait*>(argument);
        return BarrierBits::of(wait.barrier).parity != wait.parity;
      },
      &wait);
  lacks_fence[threadIdx.x] = true;
}

inline void fence_shared_for_wgmma() { lacks_fence[threadIdx.x] = false; }
template <int kCount>
void increase_registers() {}
template <int kCount>
void decrease_registers() {}

// Products ---------------------------------------------------------------------------------------

inline uint64_t matrix_descriptor(const void* first, int leading = 16) {
  const uint64_t start = (shared_address(first) & 0x3ffff) >> 4;
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t(leading >> 4) << 16 | start;
}
inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// What a descriptor says: bits 0-13 start, 16-29 leading and 32-45 stride byte offset, each / 16,
// 49-51 base offset, 62-63 swizzle mode, of which kernels use 1, 128 bytes (PTX ISA).
struct MatrixLayout {
  uint32_t start, leading, stride;

  explicit MatrixLayout(uint64_t descriptor)
      : start(descriptor << 4 & 0x3fff0), leading(descriptor >> 12 & 0x3fff0),
        stride(descriptor >> 28 & 0x3fff0) {
    if (descriptor >> 62 != 1) simt::fail("wgmma without 128-byte swizzle");
    if (descriptor >> 49 & 7) simt::fail("wgmma with a base offset");
  }

  static uint16_t at(uint32_t address) {
    uint16_t element;
    address ^= (address >> 7 & 7) << 4;
    std::memcpy(&element, shared_pointer(address & ~15u) + (address & 15), sizeof element);
    return element;
  }
  // Rows of 64 k; eight of them are an atom, and the next atom lies a stride on.
  uint16_t by_k(uint32_t row, uint32_t k) const {
    if (start % 128 + 32 > 128) simt::fail("wgmma crosses the rows of the swizzle");
    return at(start + row / 8 * stride + row % 8 * 128 + 2 * k);
  }
  // Rows of 64 columns; of eight k the next atom lies a stride on, of 64 columns a leading.
  uint16_t by_column(uint32_t k, uint32_t column) const {
    return at(start + k / 8 * stride + k % 8 * 128 + column / 64 * leading + column % 64 * 2);
  }
};

// The products of a warp that are on their way. They take place when they are waited for, which is
// as late as the machine allows: operands that change before spoil them.
struct Product {
  struct Lane {
    float (*d)[4];
    const uint32_t* a;  // null: A is in shared memory
  } lanes[32];
  uint64_t a, b;
  int columns, group;
  bool add;
  float (*to_float)(uint16_t);
};
struct ProductQueue {
  uint64_t block = 0;
  int group = 0;
  std::vector<Product> products;

  // Of the current block.
  static ProductQueue& of(unsigned warp) {
    static ProductQueue queues[32];
    ProductQueue& queue = queues[warp];
    if (queue.block != simt::block_number()) queue = {simt::block_number(), 0, {}};
    return queue;
  }
};

// How many products 64 rows high the tensor cores have made, for the tests.
inline int64_t wgmma_quarters = 0;
extern "C" __attribute__((visibility("default"), used)) inline int64_t tokred_simt_wgmma_count() {
  return wgmma_quarters / 4;
}

inline void multiply(const Product& product, unsigned warp) {
  float left[16][16], right[32][16][8];
  const auto number = [&](uint32_t bits) { return product.to_float(static_cast<uint16_t>(bits)); };
  const MatrixLayout b(product.b);
  const bool from_registers = product.lanes[0].a != nullptr;
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      if (from_registers) {
        const uint32_t pair = product.lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
        left[row][k] = number(pair >> 16 * (k % 2));
      } else {
        left[row][k] = number(MatrixLayout(product.a).by_k(warp % 4 * 16 + row, k));
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < product.columns; ++column) {
      right[column / 8][k][column % 8] =
          number(from_registers ? b.by_column(k, column) : b.by_k(column, k));
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int tile = 0; tile < product.columns / 8; ++tile) {
      float sum[8] = {};
      const auto at = [&](int column) -> float& {
        return product.lanes[row % 8 * 4 + column / 2].d[tile][row / 8 * 2 + column % 2];
      };
      for (int column = 0; column < 8 && product.add; ++column) sum[column] = at(column);
      simt::add_products(sum, left[row], right[tile]);
      for (int column = 0; column < 8; ++column) at(column) = sum[column];
    }
  }
  ++wgmma_quarters;
}

template <class T>
void enqueue(float (*d)[4], int columns, const uint32_t* a_registers, uint64_t a, uint64_t b,
             bool add) {
  if (lacks_fence[threadIdx.x]) simt::fail("wgmma without a fence for what others have written");
  for (int i = 0; i < 4 * columns / 8 && !add; ++i) d[i / 4][i % 4] = __uint_as_float(0x7fffffff);
  struct Argument {
    Product::Lane lane;
    uint64_t a, b;
    int columns;
    bool add;
    unsigned warp;
  } argument{{d, a_registers}, a, b, columns, add, threadIdx.x / 32};
  simt::collective(~0u, argument, [](Argument* const* lanes) {
    const Argument& first = *lanes[0];
    ProductQueue& queue = ProductQueue::of(first.warp);
    Product product{{}, first.a, first.b, first.columns, queue.group, first.add, [](uint16_t bits) {
                      return to_float(T{bits});
                    }};
    for (int i = 0; i < 32; ++i) {
      if (lanes[i]->a != first.a || lanes[i]->b != first.b) {
        simt::fail("wgmma of a matrix that is not one for all lanes");
      }
      product.lanes[i] = lanes[i]->lane;
    }
    queue.products.push_back(product);
  });
}
template <class T, int kTiles>
void wgmma(T, float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add) {
  enqueue<T>(d, 8 * kTiles, nullptr, a, b, add);
}
template <class T, int kTiles>
void wgmma(T, float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  enqueue<T>(d, 8 * kTiles, a, 0, b, true);
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
  unsigned warp = threadIdx.x / 32;
  simt::collective(~0u, warp, [](unsigned* const* lanes) { ++ProductQueue::of(*lanes[0]).group; });
}
template <int N, int kTiles>
void wgmma_wait(float (&)[kTiles][4]) {
  unsigned warp = threadIdx.x / 32;
  simt::collective(~0u, warp, [](unsigned* const* lanes) {
    ProductQueue& queue = ProductQueue::of(*lanes[0]);
    std::erase_if(queue.products, [&](const Product& product) {
      if (product.group >= queue.group - N) return false;
      multiply(product, *lanes[0]);
      return true;
    });
  });
}

}  // namespace tokred::cuda
