// CUDA's device functions on the host, for compiling the kernels of csrc with a C++ compiler.
// Every thread of a block is a fiber. A warp runs until all of its lanes wait for the block or for
// another warp, and warps, lanes and blocks take turns in shuffled order, so a kernel that lacks a
// barrier gives wrong answers. Shared memory starts as NaNs. Divergent barriers and collectives
// raise, and so does a block in which every thread waits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace simt {

// What a block may have of shared memory: that of an H100 unless a device with less is chosen.
size_t shared_limit();
void set_shared_limit(size_t bytes);

// Runs body(context) once per thread of every block. Throws std::runtime_error where the kernel
// breaks a rule of the machine.
void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, const A&... args) {
  auto body = [&] { kernel(args...); };
  run(grid, block, shared_bytes, [](void* raw) { (*static_cast<decltype(body)*>(raw))(); }, &body);
}

void* shared_memory();                                // the block's dynamic shared memory
bool is_shared(const void* pointer, size_t bytes);    // lies inside it
[[noreturn]] void fail(const char* why);              // ends the launch with an error
unsigned lane();

// Waits until every live lane of `mask` has arrived here with the same `run`, which is then called
// once: arguments[i] is what lane i brought, null for the lanes outside the mask.
using WarpFunction = void (*)(void* const* arguments);
void converge(unsigned mask, WarpFunction run, void* argument);

template <class A, class F>
void collective(unsigned mask, A& argument, F) {
  converge(mask, [](void* const* lanes) { F{}(reinterpret_cast<A* const*>(lanes)); }, &argument);
}

// Waits for the whole block; returns how many threads brought a true predicate.
int block_barrier(bool predicate);

// Waits for other threads to make ready(argument) true.
void wait_until(bool (*ready)(void* argument), void* argument);

// A number that no other block has had, of this launch or of one before.
uint64_t block_number();

// cp.async: `bytes` of 16 are copied and the rest zeroed when the copy's group is waited for. Until
// then the destination is garbage.
void copy_async(void* destination, const void* source, unsigned bytes, unsigned size = 16);
void copy_commit();
void copy_wait(int groups_in_flight);
// Calls notify(argument) once this thread's copies so far are complete, some time from now on.
void copy_notify(void (*notify)(void* argument), void* argument);

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  struct Argument {
    T value;
    unsigned source;
    T result;
  } a{value, source, value};
  collective(mask, a, [](Argument* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      const Argument* from = lanes[lanes[i]->source & 31];
      if (!from) fail("a shuffle reads a lane that takes no part in it");
      lanes[i]->result = from->value;
    }
  });
  return a.result;
}

// result[i] = f(the participants' values, i) for every participant.
template <class T, class F>
T reduce(unsigned mask, T value, F) {
  struct Argument {
    T value, result;
  } a{value, value};
  collective(mask, a, [](Argument* const* lanes) {
    T total{};
    bool first = true;
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      total = first ? lanes[i]->value : F{}(total, lanes[i]->value);
      first = false;
    }
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) lanes[i]->result = total;
  });
  return a.result;
}

template <class T, class F>
T fetch(T* p, F f) {
  static_assert(std::is_integral_v<T>, "float atomics would not be deterministic");
  const T old = *p;
  *p = f(old);
  return old;
}

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

}  // namespace simt

// Barriers and warp collectives ------------------------------------------------------------------
inline void __syncthreads() { simt::block_barrier(false); }
inline int __syncthreads_or(int p) { return simt::block_barrier(p) > 0; }
inline void __syncwarp(unsigned mask = ~0u) {
  int nothing = 0;
  simt::collective(mask, nothing, [](int* const*) {});
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  const unsigned base = simt::lane() & ~(width - 1u);
  return simt::shuffle(mask, v, base | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int other, int width = 32) {
  const unsigned from = simt::lane() ^ other;
  const bool inside = (from & ~(width - 1u)) == (simt::lane() & ~(width - 1u));
  return simt::shuffle(mask, v, inside ? from : simt::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const bool inside = (simt::lane() & (width - 1)) >= delta;
  return simt::shuffle(mask, v, inside ? simt::lane() - delta : simt::lane());
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const bool inside = (simt::lane() & (width - 1)) + delta < unsigned(width);
  return simt::shuffle(mask, v, inside ? simt::lane() + delta : simt::lane());
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  return simt::reduce(mask, p ? 1u << simt::lane() : 0u,
                      [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
  struct Argument {
    T value;
    unsigned peers;
  } a{v, 0};
  simt::collective(mask, a, [](Argument* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; lanes[i] && j < 32; ++j) {
        if (lanes[j] && lanes[j]->value == lanes[i]->value) lanes[i]->peers |= 1u << j;
      }
    }
  });
  return a.peers;
}
template <class T>
T __reduce_add_sync(unsigned mask, T v) {
  return simt::reduce(mask, v, [](T a, T b) { return T(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T v) {
  return simt::reduce(mask, v, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T v) {
  return simt::reduce(mask, v, [](T a, T b) { return a < b ? a : b; });
}

// Atomics, integers only -------------------------------------------------------------------------
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return simt::fetch(p, [&](T old) { return T(old + v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return simt::fetch(p, [&](T old) { return old > v ? old : v; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return simt::fetch(p, [&](T old) { return old < v ? old : v; });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return simt::fetch(p, [&](T old) { return T(old | v); });
}

// Intrinsics -------------------------------------------------------------------------------------
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(unsigned long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
// Four of the eight bytes of x and y, x's first, by the low three bits of four nibbles.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
