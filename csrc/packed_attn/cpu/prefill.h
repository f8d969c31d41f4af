// Which calls of packed_attention are worked on in panels of many query rows.
#pragma once

#include "attention/cpu/decode.h"
#include "common/cpu/parallel.h"
#include "packed_attn/params.h"

namespace tokred::TOKRED_ISA {

inline bool in_panels(const PackedAttentionParams& s) {
  const bool all = !s.lists.indices && s.lists.length == s.attention.keys;
  return all && !is_decode(s.attention);
}

void packed_attention_panels(const PackedAttentionParams&, const Parallel&);

}  // namespace tokred::TOKRED_ISA
