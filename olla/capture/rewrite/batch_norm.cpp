// The kernel of PyTorch's batch_norm_backward on the CPU, given the tensors that it writes.

#include <ATen/native/batch_norm.h>

namespace {

at::Tensor tensor(void* known) {  // shared with Python, which knows it by this address; none: undefined
  using Shared = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  return known ? at::Tensor(Shared::reclaim_copy(static_cast<c10::TensorImpl*>(known))) : at::Tensor();
}

}  // namespace

extern "C" bool olla_batch_norm_backward(void** given, bool train, double eps) {
  try {
    at::Tensor of_input = tensor(given[0]), of_weight = tensor(given[1]), of_bias = tensor(given[2]);
    at::native::batch_norm_cpu_backward_stub(
        at::kCPU, of_input, of_weight, of_bias, tensor(given[3]), tensor(given[4]), tensor(given[5]), tensor(given[6]),
        tensor(given[7]), tensor(given[8]), tensor(given[9]), train, eps);
    return true;
  } catch (...) {  // which must not reach Python through ctypes
    return false;
  }
}
