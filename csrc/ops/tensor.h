// What every op needs around torch's stable ABI: views and fresh tensors without a trip through the
// dispatcher, a switch over dtypes, and the pieces of an error message.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/scalar.h"

namespace fastdni {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// An argument rule: FASTDNI_CHECK(condition, op, ": ", argument, " must be ..., got ...") raises a
// RuntimeError of these parts and no others (torch's own macro adds a source line in front). They
// are only formed when the condition fails.
#define FASTDNI_CHECK(condition, ...) ((condition) ? void() : ::fastdni::fail(__VA_ARGS__))

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

inline std::string to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return std::string(torch::headeronly::toString(dtype));
  }
}

inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max(shape[i], int64_t{1});
  return strides;
}

// A fresh contiguous tensor on the device of `like`, in its dtype or in its accumulate dtype.
inline Tensor empty(const Tensor& like, const Shape& shape, int32_t shim_dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const Shape strides = contiguous_strides(shape);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                                                  shim_dtype, device_type, device_index, &handle));
  return Tensor(handle);
}
inline Tensor empty(const Tensor& like, const Shape& shape) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(like, shape, dtype);
}
// Errors and losses of bfloat16 tensors are kept in float32.
inline Tensor empty_accumulate(const Tensor& like, const Shape& shape) {
  return like.scalar_type() == ScalarType::BFloat16 ? empty(like, shape, aoti_torch_dtype_float32())
                                                    : empty(like, shape);
}

// The same memory seen with other sizes and strides.
inline Tensor view(const Tensor& tensor, const Shape& shape, const Shape& strides) {
  constexpr int64_t kFurther = 0;  // counted from the tensor's own first element
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), shape.size(), shape.data(),
                                                        strides.data(), kFurther, &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The number of rows of (..., K).
inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

// (..., K) -> (rows, K); the tensor must be contiguous.
inline Tensor as_matrix(const Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  const int64_t columns = tensor.size(-1);
  return view(tensor, {rows_of(tensor), columns}, {std::max(columns, int64_t{1}), 1});
}

inline Tensor transposed(const Tensor& matrix) {
  return view(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Tensors that belong to somebody else, who keeps them for as long as these are used: references
// that do not count. (Counted ones would hide from Python's garbage collector, and keep
// torch.utils.swap_tensors from working.) A handle is the address of an at::Tensor, and that is one
// pointer to the tensor's implementation, which is put into an empty one here.
class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(const Borrowed&) = delete;
  ~Borrowed() { give_back(); }

  void borrow(const std::vector<Tensor>& owned) {
    give_back();
    for (const Tensor& tensor : owned) {
      nothing_ = implementation(tensors_.emplace_back());
      implementation(tensors_.back()) = implementation(tensor);
    }
  }

  void give_back() {
    for (const Tensor& tensor : tensors_) implementation(tensor) = nothing_;
    tensors_.clear();
  }

  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  static void*& implementation(const Tensor& tensor) {
    return *reinterpret_cast<void**>(tensor.get());
  }

  std::vector<Tensor> tensors_;
  void* nothing_ = nullptr;  // what an empty tensor has in its place
};

// Calls body(T{}) with the C++ type of `dtype`; the op's check has let only these three through.
template <class Body>
void with_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    default:
      FASTDNI_CHECK(false, "fastdni: no kernel for ", to_string(dtype));
  }
}

inline bool has_kernel(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16;
}

}  // namespace fastdni
