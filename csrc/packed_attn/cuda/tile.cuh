// How unpacked keys and queries meet.
#pragma once

#include "attention/cuda/bf16_planes.cuh"

namespace tokred::cuda::attention {

// How keys and queries meet, by the dtype of the query.
template <class T>
struct KeyOperandOf {
  using type = Split<T>;
};
template <>
struct KeyOperandOf<float> {
  using type = float;
};
template <class T>
using KeyOperand = typename KeyOperandOf<T>::type;

}  // namespace tokred::cuda::attention
