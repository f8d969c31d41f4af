// kv_pack: group quantization of keys and values to 1, 2, 3, 4 or 8 bits. Every number is read and
// every code written once.
#include "kv_pack/cpu/rows.h"
#include "kv_pack/cpu/tasks.h"

namespace tokred::TOKRED_ISA {
namespace {

template <class T>
void pack_part(const KvPackParams& p, int64_t batch, int64_t head, int64_t first, int64_t last) {
  const T* x = head_start<T>(p.x, batch, head);
  pack_tokens<T>(
      [&](int64_t t) { return SourceRow<T>{x + t * p.x.stride_token, p.packed.format.rotated}; },
      [](int64_t t) { return t; }, first, last, p.packed, packed_head(p.packed, batch, head));
}

}  // namespace

void kv_pack(const KvPackParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() {
    for_parts(p.packed, p.batch, p.heads, parallel,
              [&](int64_t batch, int64_t head, int64_t first, int64_t last) {
                pack_part<T>(p, batch, head, first, last);
              });
  });
}

}  // namespace tokred::TOKRED_ISA
