// boxed<function>: a front end as torch calls it, on a stack of StableIValues. It does what
// TORCH_BOX does, but moves arguments and results where that copies every result.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "tensor.h"

template <>
struct torch::stable::detail::ToImpl<tokred::Tensor> {
  static tokred::Tensor call(StableIValue value, uint64_t, bool) {
    return tokred::Tensor(to<AtenTensorHandle>(value));
  }
};

template <>
struct torch::stable::detail::ToImpl<tokred::OptionalTensor> {
  // torch passes ownership of what `value` points to.
  static tokred::OptionalTensor call(StableIValue value, uint64_t, bool) {
    const std::unique_ptr<StableIValue> given(to<StableIValue*>(value));
    if (!given) return {};
    return tokred::Tensor(to<AtenTensorHandle>(*given));
  }
};

template <>
struct torch::stable::detail::ToImpl<std::vector<tokred::Tensor>> {
  static std::vector<tokred::Tensor> call(StableIValue value, uint64_t, bool) {
    const auto list = to<StableListHandle>(value);
    size_t count = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &count));
    std::vector<tokred::Tensor> tensors;
    tensors.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      StableIValue item = 0;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      tensors.emplace_back(to<AtenTensorHandle>(item));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    return tensors;
  }
};

namespace tokred {

template <class T>
StableIValue box_result(T&& result) {
  return torch::stable::detail::from(result);
}
inline StableIValue box_result(Tensor&& result) {
  return torch::stable::detail::from(result.release());
}
inline StableIValue box_result(std::vector<Tensor>&& results) {
  StableListHandle list = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(results.size(), &list));
  for (Tensor& result : results)
    TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, box_result(std::move(result))));
  return torch::stable::detail::from(list);
}

inline void box_results(StableIValue*) {}
template <class T>
void box_results(StableIValue* stack, T&& result) {
  *stack = box_result(std::move(result));
}
template <class... T>
void box_results(StableIValue* stack, std::tuple<T...>&& results) {
  std::apply([&](T&... result) { ((*stack++ = box_result(std::move(result))), ...); }, results);
}

template <class Result, class... Args>
struct Boxed {
  template <Result (*function)(Args...)>
  static void call(StableIValue* stack, uint64_t arguments, uint64_t) {
    TOKRED_CHECK(arguments == sizeof...(Args), "the schema has ", arguments,
                 " arguments and the function ", sizeof...(Args));
    const auto run = [&]<size_t... i>(std::index_sequence<i...>) -> Result {
      std::tuple<std::remove_cvref_t<Args>...> values{
          torch::stable::detail::to<std::remove_cvref_t<Args>>(stack[i])...};
      return std::apply(function, std::move(values));
    };
    if constexpr (std::is_void_v<Result>) {
      run(std::index_sequence_for<Args...>());
    } else {
      box_results(stack, run(std::index_sequence_for<Args...>()));
    }
  }
};

template <auto function, class Result, class... Args>
auto boxed(Result (*)(Args...)) {
  return &Boxed<Result, Args...>::template call<function>;
}

}  // namespace tokred
