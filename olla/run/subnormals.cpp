// Batches of matrix products on the CPU, whose first factors may hold subnormal numbers, with the bits of MKL's.
//
// Intel's processors leave each vector with a subnormal number, below 2^-126, to microcode, which takes its time. Two
// facts spare most of that, where products are added up one after the other, and rounded at each addition:
// - A sum below 2^-126 is rounded to a whole number of units of 2^-149. So is, to units of 1, a float about 3 * 2^22.
// - What is less than 2^-26 of a sum does not change it.

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cfloat>
#include <cmath>

namespace {

using at::Tensor;

constexpr int64_t kColumns = 32;         // that are added up together
constexpr int64_t kWork = 1 << 15;       // multiplications that are worth a thread
constexpr float kCounter = 3 << 22;      // a float whose unit is 1, and even, as is that of its neighbours
constexpr float kMost = 1 << 22;         // that it can count
constexpr uint32_t kMagnitude = ~0u >> 1;  // the bits of a float but for its sign

bool is_tiny(float number) { return std::abs(number) < FLT_MIN; }  // subnormal or zero

float units_of(float tiny) {
  const float units = static_cast<int32_t>(std::bit_cast<uint32_t>(tiny) & kMagnitude);
  return std::signbit(tiny) ? -units : units;
}

float tiny_of(float units) {
  const uint32_t magnitude = static_cast<int32_t>(std::abs(units));
  return std::bit_cast<float>(std::signbit(units) ? magnitude | ~kMagnitude : magnitude);
}

void add(float factor, const float* row, float* sums) {
  for (int64_t j = 0; j < kColumns; ++j) sums[j] = std::fma(factor, row[j], sums[j]);
}

bool are_counted(const float* sums) {
  int all = 1;
  for (int64_t j = 0; j < kColumns; ++j) all &= std::abs(sums[j] - kCounter) < kMost;
  return all;
}

// Whether a tiny part of the row leaves all sums as they are.
bool stay(const float* sums, const float* row) {
  int all = 1;
  for (int64_t j = 0; j < kColumns; ++j) all &= std::abs(sums[j]) * 0x1p100f > std::abs(row[j]);
  return all;
}

// Adds up rows while their factors are tiny, and returns how many: none if that gives more than can be counted.
int64_t count(const float* factors, int64_t step, const float* rows, int64_t stride, int64_t depth, float* sums) {
  std::fill_n(sums, kColumns, kCounter);
  int64_t k = 0;
  for (; k < depth && is_tiny(factors[k * step]); ++k) {
    add(units_of(factors[k * step]), rows + k * stride, sums);
    if (!are_counted(sums)) {
      std::fill_n(sums, kColumns, 0.0f);
      return 0;
    }
  }
  for (int64_t j = 0; j < kColumns; ++j) sums[j] = tiny_of(sums[j] - kCounter);
  return k;
}

// The sum of rows, each times its factor.
void sum(const float* factors, int64_t step, const float* rows, int64_t stride, int64_t depth, float* out) {
  float sums[kColumns];
  const int64_t counted = count(factors, step, rows, stride, depth, sums);
  for (int64_t k = counted; k < depth; ++k) {
    const float factor = factors[k * step], *row = rows + k * stride;
    if (!is_tiny(factor) || !stay(sums, row)) add(factor, row, sums);
  }
  if (counted && std::find(sums, sums + kColumns, 0.0f) != sums + kColumns) {  // of a sign that was not counted
    std::fill_n(sums, kColumns, 0.0f);
    for (int64_t k = 0; k < depth; ++k) add(factors[k * step], rows + k * stride, sums);
  }
  std::copy_n(sums, kColumns, out);
}

// Calls ``work`` with ranges of the matrices of ``batch``, on PyTorch's threads.
template <typename Work>
void for_matrices(const Tensor& batch, int64_t work_of_one, const Work& work) {
  Tensor firsts = batch.select(2, 0).select(1, 0);
  const auto* start = static_cast<const float*>(batch.const_data_ptr());
  const int64_t stride = batch.stride(0);
  at::TensorIterator::nullary_op(firsts).for_each(
      [&](char** data, const int64_t*, int64_t count) {
        const int64_t first = (reinterpret_cast<const float*>(data[0]) - start) / stride;
        work(first, first + count);
      },
      std::max<int64_t>(1, kWork / work_of_one));
}

bool holds_subnormals(const Tensor& batch) {
  const int64_t size = batch.size(1) * batch.size(2);
  const float* numbers = batch.const_data_ptr<float>();
  std::atomic<bool> found = false;
  for_matrices(batch, size, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end && !found; ++i) {
      int any = 0;
      for (int64_t j = 0; j < size; ++j) {
        const uint32_t magnitude = std::bit_cast<uint32_t>(numbers[i * size + j]) & kMagnitude;
        any |= magnitude - 1 < std::bit_cast<uint32_t>(FLT_MIN) - 1;
      }
      if (any) found = true;
    }
  });
  return found;
}

bool is_known(const Tensor& one, const Tensor& other) {
  return one.scalar_type() == at::kFloat && (one.is_contiguous() || one.transpose(1, 2).is_contiguous()) &&
         other.scalar_type() == at::kFloat && other.stride(2) == 1 && other.size(2) % kColumns == 0;
}

Tensor bmm(const Tensor& one, const Tensor& other, int64_t threads) {
  if (at::get_num_threads() != threads || !is_known(one, other) || !holds_subnormals(one)) return at::bmm(one, other);
  const int64_t rows = one.size(1), depth = one.size(2), columns = other.size(2);
  const Tensor out = at::empty({one.size(0), rows, columns}, one.options());
  const float* factors = one.const_data_ptr<float>();
  const float* others = other.const_data_ptr<float>();
  float* sums = out.mutable_data_ptr<float>();
  for_matrices(out, rows * depth * columns, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < columns; j += kColumns)
          sum(factors + i * one.stride(0) + row * one.stride(1), one.stride(2), others + i * other.stride(0) + j,
              other.stride(1), depth, sums + (i * rows + row) * columns + j);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(olla, CPU, library) { library.impl("bmm", bmm); }
