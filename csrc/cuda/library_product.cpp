#include "cuda/library_product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

// Quicker than the dispatcher, which takes no number besides. Of CUDA builds of torch alone.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out,
                                                                       AtenTensorHandle self,
                                                                       AtenTensorHandle mat2);
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_dtype_out(AtenTensorHandle out,
                                                                             AtenTensorHandle self,
                                                                             AtenTensorHandle mat2,
                                                                             int32_t out_dtype);
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                          AtenTensorHandle mat2, double beta, double alpha);

namespace fastdni {
namespace {

Tensor tensor_at(const Tensor& like, const MatrixAt& matrix, int32_t dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int64_t sizes[] = {matrix.rows, matrix.columns};
  const int64_t strides[] = {matrix.transposed ? 1 : matrix.columns,
                             matrix.transposed ? matrix.rows : 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      matrix.data, 2, sizes, strides, 0, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

int32_t dtype_of(const Tensor& like) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return dtype;
}

// The function for a tensor's device.
template <class Function>
Function* on_device(const Tensor& like, Function* of_cpu, Function* of_cuda) {
  Function* found = like.is_cpu() ? of_cpu : of_cuda;
  FASTDNI_CHECK(found != nullptr, "fastdni: this torch has no such product on a GPU");
  return found;
}

}  // namespace

void library_product(const Tensor& like, const MatrixAt& out, const MatrixAt& a,
                     const MatrixAt& b) {
  const int32_t dtype = dtype_of(like);
  const Tensor left = tensor_at(like, a, dtype), right = tensor_at(like, b, dtype);
  const Tensor product = tensor_at(like, out, dtype);
  const auto multiply = on_device(like, aoti_torch_cpu_mm_out, aoti_torch_cuda_mm_out);
  TORCH_ERROR_CODE_CHECK(multiply(product.get(), left.get(), right.get()));
}

void add_library_product(const Tensor& like, const MatrixAt& out, const MatrixAt& a,
                         const MatrixAt& b, double scale) {
  const int32_t dtype = dtype_of(like);
  const Tensor sum = tensor_at(like, out, dtype);
  const Tensor left = tensor_at(like, a, dtype), right = tensor_at(like, b, dtype);
  const auto add = on_device(like, aoti_torch_cpu_addmm_out, aoti_torch_cuda_addmm_out);
  TORCH_ERROR_CODE_CHECK(add(sum.get(), sum.get(), left.get(), right.get(), 1.0, scale));
}

void library_product_bfloat16(const Tensor& like, const MatrixAt& out, const MatrixAt& a,
                              const MatrixAt& b, void* scratch) {
  const int32_t dtype = dtype_of(like), narrow = aoti_torch_dtype_bfloat16();
  MatrixAt narrow_a = a, narrow_b = b;
  narrow_a.data = scratch;
  narrow_b.data = static_cast<bfloat16*>(scratch) + a.rows * a.columns;
  Tensor of_a = tensor_at(like, narrow_a, narrow), of_b = tensor_at(like, narrow_b, narrow);
  torch::stable::copy_(of_a, tensor_at(like, a, dtype));
  torch::stable::copy_(of_b, tensor_at(like, b, dtype));
  const Tensor product = tensor_at(like, out, dtype);
  FASTDNI_CHECK(aoti_torch_cuda_mm_dtype_out != nullptr,
                "fastdni: this torch has no such product on a GPU");
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cuda_mm_dtype_out(product.get(), of_a.get(), of_b.get(), dtype));
}

}  // namespace fastdni
