// kv_pack and kv_append read and write every byte once. Keys and values in bf16, of
// 1048576 rows of 128 each, to 4 bits in groups of 32: 537 MB read, 168 MB written, 165 us at the
// 4.3 TB/s that an H200 reaches. Rows that packs_runs() names take pack_runs.cu; all others the
// kernels here, whose instructions outweigh the bytes. Along tokens the rows are read a second
// time, from a cache. Appending a token takes two launches, about 6 us.
#include "kv_pack/cuda/kv_pack.cuh"
#include "kv_pack/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace packing;

void launch_pack(const KvAppendParams& p, Stream stream) {
  const PackFormat& f = p.packed.format;
  const int64_t tokens = max_packed(f.axis, p.window_rows, p.tokens, p.lengths ? -1 : p.length);
  if (f.head_dim > kMaxHeadDim) return launch_pack_wide(p, tokens, stream);
  if (launch_pack_runs(p, tokens, stream)) return;
  visit_dtype(p.dtype, [&]<class T>() {
    visit_lanes(f.head_dim, [&]<int kLanes>() {
      static_assert(sizeof(PackShared<kLanes>) == pack_shared_bytes(kLanes));
      launch(pack_kernel<T, kLanes>, plan_kv_pack(f, p.batch * p.heads, tokens), stream, p,
             pack_units(f, tokens));
    });
  });
}

}  // namespace

void kv_pack(const KvPackParams& p, Stream stream) {
  KvAppendParams all{};
  all.x = p.x;
  all.packed = p.packed;
  all.slots.capacity = p.packed.rows;
  all.batch = p.batch;
  all.heads = p.heads;
  all.tokens = p.packed.rows;
  all.dtype = p.dtype;
  launch_pack(all, stream);
}

void kv_append(const KvAppendParams& p, Stream stream) {
  launch_pack(p, stream);
  const int64_t newest = p.tokens < p.window_rows ? p.tokens : p.window_rows;
  const int64_t head_dim = p.packed.format.head_dim;
  if (head_dim > kMaxHeadDim) return launch_wide_window(p, newest, stream);
  visit_dtype(p.dtype, [&]<class T>() {
    visit_lanes(head_dim, [&]<int kLanes>() {
      launch(write_window_kernel<T, kLanes>, plan_packed_rows(head_dim, p.batch * p.heads * newest),
             stream, p, newest);
    });
  });
}

}  // namespace tokred::cuda
