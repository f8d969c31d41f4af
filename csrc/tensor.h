// Tensors of torch's stable ABI for front ends: checks, allocation, and views as plain structs.
// Every check names the argument, what it was and what it must be.
#pragma once

#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "common/cpu/pages.h"
#include "common/types.h"

// The text is all that callers see; torch's own macros add a file of the build to it.
#define TOKRED_CHECK(condition, ...)                             \
  do {                                                           \
    if (!(condition)) ::tokred::refuse("tokred: ", __VA_ARGS__); \
  } while (false)

namespace tokred {

template <class... Args>
[[noreturn, gnu::noinline, gnu::cold]] void refuse(const Args&... args) {
  std::ostringstream text;
  ((text << args), ...);
  throw std::runtime_error(text.str());
}

using torch::headeronly::ScalarType;

// A handle to a tensor, with its metadata read once. Move-only: torch::stable::Tensor allocates a
// count of owners, and asks torch again for every size.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
    sizes_ = sizes;
    strides_ = strides;
    element_size_ = aoti_torch_dtype_element_size(dtype);
    namespace stable = torch::stable::detail;
    scalar_type_ = stable::to<ScalarType>(stable::from(dtype));
  }

  AtenTensorHandle get() const { return handle_.get(); }
  AtenTensorHandle release() { return handle_.release(); }

  int64_t dim() const { return dims_; }
  int64_t size(int64_t dim) const { return sizes_[checked(dim)]; }
  int64_t stride(int64_t dim) const { return strides_[checked(dim)]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dims_; ++i) count *= sizes_[i];
    return count;
  }
  bool is_contiguous() const {
    bool contiguous = false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(get(), &contiguous));
    return contiguous;
  }
  ScalarType scalar_type() const { return scalar_type_; }
  size_t element_size() const { return element_size_; }
  int32_t device_type() const { return device_type_; }
  int32_t get_device_index() const { return device_index_; }

  const void* const_data_ptr() const {
    const void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(get(), &data));
    return data;
  }
  void* mutable_data_ptr() const {
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(get(), &data));
    return data;
  }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };

  int64_t checked(int64_t dim) const {
    TOKRED_CHECK(dim >= 0 && dim < dims_, "a tensor of ", dims_, " dimensions has no dimension ",
                 dim);
    return dim;
  }

  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
  const int64_t* sizes_;  // torch's own
  const int64_t* strides_;
  int64_t dims_;
  size_t element_size_;
  ScalarType scalar_type_;
  int32_t device_type_, device_index_;
};
using OptionalTensor = std::optional<Tensor>;

// What an op returns.
template <class... T>
std::tuple<T...> moved(T&... results) {
  return {std::move(results)...};
}

// A `str` argument of an op: for a std::string_view argument torch leaks the string behind it.
struct Text {
  std::string value;
  operator std::string_view() const { return value; }
};

template <class F>
std::string list_string(char opening, int64_t count, const F& number, char closing) {
  std::string text(1, opening);
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(number(i));
  return text + closing;
}
inline std::string shape_string(const Tensor& t) {
  return list_string('[', t.dim(), [&](int64_t i) { return t.size(i); }, ']');
}
inline std::string strides_string(const Tensor& t) {
  return list_string('(', t.dim(), [&](int64_t i) { return t.stride(i); }, ')');
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    default: return "a dtype of another kind";
  }
}

inline void check_dim(const Tensor& t, const char* name, int64_t dim, const char* layout) {
  TOKRED_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions ", layout, ", got shape ",
               shape_string(t));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType type) {
  TOKRED_CHECK(t.scalar_type() == type, name, " must be ", dtype_name(type), ", got ",
               dtype_name(t.scalar_type()));
}

inline void check_same_dtype(const Tensor& t, const char* name, const Tensor& like,
                             const char* like_name) {
  TOKRED_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name,
               " (", dtype_name(like.scalar_type()), "), got ", dtype_name(t.scalar_type()));
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& like,
                              const char* like_name) {
  TOKRED_CHECK(
      t.device_type() == like.device_type() && t.get_device_index() == like.get_device_index(),
      name, " must be on the device of ", like_name, ", and is not");
}

inline void check_last_contiguous(const Tensor& t, const char* name) {
  TOKRED_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name,
               " must be contiguous in its last dimension, got stride ", t.stride(t.dim() - 1),
               "; call .contiguous() where the copy is acceptable");
}

// A size of -1 in `shape` accepts any size.
inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                        const char* layout) {
  check_dim(t, name, static_cast<int64_t>(shape.size()), layout);
  int64_t dim = 0;
  for (int64_t want : shape) {
    TOKRED_CHECK(want < 0 || t.size(dim) == want, name, " must be ", layout, " with size ", want,
                 " in dimension ", dim, ", got shape ", shape_string(t));
    ++dim;
  }
}

// f32, f16 or bf16, and f64 where `allow_double`.
inline DType float_dtype(const Tensor& t, const char* name, bool allow_double) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double:
      if (allow_double) return DType::f64;
      [[fallthrough]];
    default:
      TOKRED_CHECK(false, name, " must be float32, float16 or bfloat16",
                   allow_double ? " (or float64 on the CPU)" : "", ", got ",
                   dtype_name(t.scalar_type()));
  }
  return DType::f32;
}

inline ScalarType accumulator_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The value that `text` names among (name, value) pairs.
template <class E>
E parse_choice(std::string_view text, const char* name,
               std::initializer_list<std::pair<const char*, E>> choices) {
  std::string names;
  for (const auto& [choice, value] : choices) {
    if (text == choice) return value;
    names += (names.empty() ? "" : ", ") + std::string(choice);
  }
  TOKRED_CHECK(false, name, " must be one of ", names, ", got '", std::string(text), "'");
  return choices.begin()->second;
}

inline Metric parse_metric(std::string_view name) {
  return parse_choice<Metric>(name, "metric",
                              {{"cosine", Metric::cosine},
                               {"dot", Metric::dot},
                               {"l2", Metric::l2},
                               {"half_cosine", Metric::half_cosine}});
}

// A fresh contiguous tensor on the device of `like`, on the host in huge pages where it is large.
// The unboxed shim costs a third of new_empty.
inline Tensor allocate(const Tensor& like, const int64_t* shape, int64_t dims, ScalarType type) {
  constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 16;
  const auto text = [&] {
    return list_string(
               '[', dims, [&](int64_t i) { return shape[i]; }, ']') +
           " " + dtype_name(type);
  };
  int64_t strides[8];
  int64_t step = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = step;
    const bool overflows = __builtin_mul_overflow(step, shape[i] > 0 ? shape[i] : 1, &step);
    TOKRED_CHECK(!overflows && step <= kMaxElements, "a result of ", text(), " is too large");
  }
  AtenTensorHandle handle = nullptr;
  const AOTITorchError failed = aoti_torch_empty_strided(
      dims, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      like.device_type(), like.get_device_index(), &handle);
  TOKRED_CHECK(!failed, "there is no memory for ", text());
  Tensor fresh(handle);
  if (fresh.device_type() == aoti_torch_device_type_cpu())
    advise_huge_pages(fresh.mutable_data_ptr(),
                      fresh.numel() * static_cast<int64_t>(fresh.element_size()));
  return fresh;
}
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return allocate(like, shape.begin(), static_cast<int64_t>(shape.size()), type);
}

// Memory for one call: on the stack where kernels run on the host and need little, because an
// allocation costs as much as a small op.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t bytes, bool on_host) {
    if (bytes > (on_host ? kInlineBytes : 0)) tensor_ = allocate(like, {bytes}, ScalarType::Byte);
    if (on_host) advise_huge_pages(data(), bytes, kLargeBytes);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() { return tensor_ ? tensor_->mutable_data_ptr() : inline_; }

 private:
  // malloc maps large blocks anew at every call: faulting in 47 MB by pages of 4 KiB took 34 ms,
  // filling them 7.
  static constexpr int64_t kInlineBytes = 16 << 10, kLargeBytes = 8 << 20;
  alignas(64) char inline_[kInlineBytes];
  OptionalTensor tensor_;
};

// The stride of a dimension, 0 where it has one element and is broadcast.
inline int64_t broadcast_stride(const Tensor& t, int64_t dim) {
  return t.size(dim) == 1 ? 0 : t.stride(dim);
}

// Optional lengths i32 [B]; null if absent.
inline const int32_t* batch_lengths(const OptionalTensor& lengths, int64_t batch,
                                    const Tensor& like, const char* like_name, int64_t& stride) {
  if (!lengths) return nullptr;
  check_shape(*lengths, "lengths", {batch}, "[B]");
  check_dtype(*lengths, "lengths", ScalarType::Int);
  check_same_device(*lengths, "lengths", like, like_name);
  stride = lengths->stride(0);
  return static_cast<const int32_t*>(lengths->const_data_ptr());
}

// An optional bool [B, N], or [B | 1, N] where a batch of one stands for all; null if absent.
inline const bool* token_mask(const OptionalTensor& mask, const char* name, int64_t batch,
                              int64_t tokens, bool broadcasts, const Tensor& like,
                              const char* like_name, int64_t& stride_batch, int64_t& stride_token) {
  if (!mask) return nullptr;
  const bool one = broadcasts && mask->dim() == 2 && mask->size(0) == 1;
  check_shape(*mask, name, {one ? 1 : batch, tokens}, broadcasts ? "[B | 1, N]" : "[B, N]");
  check_dtype(*mask, name, ScalarType::Bool);
  check_same_device(*mask, name, like, like_name);
  stride_batch = one ? 0 : mask->stride(0);
  stride_token = mask->stride(1);
  return static_cast<const bool*>(mask->const_data_ptr());
}

// All tokens of x [B, N, C] as a set; callers narrow it to their rows.
inline TokenSet token_set(const Tensor& x, const char* name, const OptionalTensor& mask,
                          const char* mask_name, const OptionalTensor& weight,
                          const char* weight_name) {
  check_dim(x, name, 3, "[B, N, C]");
  check_last_contiguous(x, name);
  TOKRED_CHECK(x.size(1) <= std::numeric_limits<int32_t>::max(), name,
               " may have at most 2^31 - 1 tokens, got ", x.size(1));
  TokenSet set{};
  set.data = x.const_data_ptr();
  set.stride_batch = x.stride(0);
  set.stride_token = x.stride(1);
  set.tokens = set.count = x.size(1);
  set.step = 1;
  set.mask = token_mask(mask, mask_name, x.size(0), x.size(1), false, x, name,
                        set.mask_stride_batch, set.mask_stride_token);
  if (weight) {
    check_shape(*weight, weight_name, {x.size(0), x.size(1)}, "[B, N]");
    check_dtype(*weight, weight_name, ScalarType::Float);
    check_same_device(*weight, weight_name, x, name);
    set.weight = static_cast<const float*>(weight->const_data_ptr());
    set.weight_stride_batch = weight->stride(0);
    set.weight_stride_token = weight->stride(1);
  }
  return set;
}

// A per-token table [B, N] of the accumulator type of `like`.
inline TokenTable token_table(const Tensor& t, const char* name, const Tensor& like, int64_t batch,
                              int64_t tokens) {
  check_shape(t, name, {batch, tokens}, "[B, N]");
  check_dtype(t, name, accumulator_type(like));
  check_same_device(t, name, like, "x");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}
inline TokenTable token_table(const OptionalTensor& t, const char* name, const Tensor& like,
                              int64_t batch, int64_t tokens) {
  return t ? token_table(*t, name, like, batch, tokens) : TokenTable{};
}

}  // namespace tokred

template <>
struct torch::stable::detail::ToImpl<tokred::Text> {
  // Owns the string that `value` stands for, and deletes it.
  static tokred::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    tokred::Text text{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
