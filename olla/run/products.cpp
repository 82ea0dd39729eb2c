// Matrix products on the CPU by oneDNN, added up in the order in which MKL adds them.

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

namespace at::native {  // exported, but in none of the headers that come with PyTorch
TORCH_API void mkldnn_matmul(const Tensor& one, const Tensor& other, const Tensor& out, float beta, float alpha);
}

namespace {

using at::Tensor;

constexpr int64_t kDepth = 192;  // so many products are summed up at most, and their sum is added to the result
constexpr int64_t kRows = 2048, kColumns = 1024;  // at once, of what is copied for it

// Of parts that are as equal as can be, and no larger than this.
int64_t part(int64_t whole, int64_t largest) {
  const int64_t parts = std::max<int64_t>(1, (whole + largest - 1) / largest);
  return (whole + parts - 1) / parts;
}

// out += one @ other, or out = one @ other.
void multiply(const Tensor& one, const Tensor& other, const Tensor& out, bool add) {
  const int64_t all = one.size(1), most = all < 2 * kDepth ? part(all, kDepth) : kDepth;
  for (int64_t k = 0; k < all; k += most) {
    const int64_t depth = std::min(most, all - k);
    at::native::mkldnn_matmul(one.narrow(1, k, depth), other.narrow(0, k, depth), out, add || k ? 1 : 0, 1);
  }
}

// A part of a matrix is copied, unless it lies in memory without gaps. So parts that are copied are small.
void multiply_in_pieces(const Tensor& one, const Tensor& other, const Tensor& out, bool add) {
  const int64_t rows = one.size(0), columns = other.size(1);
  const int64_t high = one.t().is_contiguous() ? rows : part(rows, kRows);
  const int64_t wide = other.is_contiguous() ? columns : part(columns, kColumns);
  for (int64_t j = 0; j < columns; j += wide)
    for (int64_t i = 0; i < rows; i += high) {
      const int64_t height = std::min(high, rows - i), width = std::min(wide, columns - j);
      multiply(one.narrow(0, i, height), other.narrow(1, j, width), out.narrow(0, i, height).narrow(1, j, width), add);
    }
}

Tensor mm(const Tensor& one, const Tensor& other, int64_t threads) {
  if (at::get_num_threads() != threads) return at::mm(one, other);
  Tensor out = at::empty({one.size(0), other.size(1)}, one.options());
  multiply_in_pieces(one, other, out, false);
  return out;
}

Tensor addmm(const Tensor& bias, const Tensor& one, const Tensor& other, int64_t threads) {
  if (at::get_num_threads() != threads) return at::addmm(bias, one, other);
  Tensor out = at::empty({one.size(0), other.size(1)}, one.options());
  out.copy_(bias.expand_as(out));
  multiply_in_pieces(one, other, out, true);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(olla, CPU, library) {
  library.impl("mm", mm);
  library.impl("addmm", addmm);
}
