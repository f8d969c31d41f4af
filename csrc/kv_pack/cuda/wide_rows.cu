// Launches kv_pack, kv_append and kv_unpack of rows of more than 256 channels. Every byte is read
// and written once, along tokens read twice; a block's eight rows lie in 23 KB of shared memory.
#include "kv_pack/cuda/wide_rows.cuh"

#include "kv_pack/cuda/launch.h"

namespace tokred::cuda::packing {

void launch_pack_wide(const KvAppendParams& p, int64_t tokens, Stream stream) {
  static_assert(sizeof(WideRows) == kWidePackBytes);
  const PackFormat& f = p.packed.format;
  visit_dtype(p.dtype, [&]<class T>() {
    launch(f.axis == GroupAxis::channel ? pack_wide_kernel<T, GroupAxis::channel>
                                        : pack_wide_kernel<T, GroupAxis::token>,
           plan_kv_pack(f, p.batch * p.heads, tokens), stream, p, pack_units(f, tokens));
  });
}

void launch_wide_window(const KvAppendParams& p, int64_t newest, Stream stream) {
  const int64_t rows = p.batch * p.heads * newest;
  visit_dtype(p.dtype, [&]<class T>() {
    launch(write_wide_window_kernel<T>, plan_packed_rows(p.packed.format.head_dim, rows), stream, p,
           newest);
  });
}

void launch_unpack_wide(const KvUnpackParams& p, Stream stream) {
  const int64_t rows = p.batch * p.heads * p.packed.rows;
  visit_dtype(p.dtype, [&]<class T>() {
    launch(unpack_wide_kernel<T>, plan_packed_rows(p.packed.format.head_dim, rows), stream, p);
  });
}

}  // namespace tokred::cuda::packing
