// Batch norms on the CPU in parts, of the same bits as PyTorch's operators: statistics, normalization, gradients.

#include <ATen/TensorIterator.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/batch_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

constexpr int kTogether = 8;  // channels
typedef float Floats __attribute__((vector_size(kTogether / 2 * sizeof(float))));
typedef double Doubles __attribute__((vector_size(kTogether / 2 * sizeof(double))));

Tensor defined(const Optional& tensor) { return tensor.value_or(Tensor()); }

bool alike(const Tensor& one, const Tensor& other) {
  return one.sizes() == other.sizes() && one.strides() == other.strides() && one.dtype() == other.dtype();
}

// Sums of kTogether channels: of numbers, or of the squares of their deviations from means.
struct Sums {
  Floats means[2] = {};
  Doubles sums[2] = {};

  void add(const float* numbers) {
    for (int half = 0; half < 2; ++half) {
      Floats number;
      std::memcpy(&number, numbers + half * kTogether / 2, sizeof(number));
      sums[half] += __builtin_convertvector(number, Doubles);
    }
  }

  void add_squares(const float* numbers) {
    for (int half = 0; half < 2; ++half) {
      Floats number;
      std::memcpy(&number, numbers + half * kTogether / 2, sizeof(number));
      const Floats deviation = number - means[half];
      sums[half] += __builtin_convertvector(deviation * deviation, Doubles);
    }
  }
};

// Calls ``add`` with the numbers of kTogether channels at one place after the other.
template <typename Add>
void for_places(const float* input, int64_t batch, int64_t stride, int64_t image, const Add& add) {
  float tile[kTogether * kTogether];
  for (int64_t n = 0; n < batch; ++n, input += stride) {
    int64_t i = 0;
    for (; i + kTogether <= image; i += kTogether) {
      at::vec::transpose_mxn<float, kTogether, kTogether>(input + i, image, tile, kTogether);
      for (int place = 0; place < kTogether; ++place) add(tile + place * kTogether);
    }
    for (; i < image; ++i) {
      for (int c = 0; c < kTogether; ++c) tile[c] = input[c * image + i];
      add(tile);
    }
  }
}

// PyTorch adds up one channel after the other, and each addition waits for the one before. Here those of several
// channels are done at once, each channel's in the same order.
void moments(const float* input, int64_t batch, int64_t stride, int64_t image, float* means, float* deviations) {
  Sums sums;
  for_places(input, batch, stride, image, [&](const float* numbers) { sums.add(numbers); });
  for (int c = 0; c < kTogether; ++c)
    means[c] = sums.means[c / 4][c % 4] = sums.sums[c / 4][c % 4] / (batch * image);
  sums.sums[0] = sums.sums[1] = Doubles{};
  for_places(input, batch, stride, image, [&](const float* numbers) { sums.add_squares(numbers); });
  for (int c = 0; c < kTogether; ++c) deviations[c] = sums.sums[c / 4][c % 4];
}

void moments_of_one(const float* input, int64_t batch, int64_t stride, int64_t image, float* mean, float* deviations) {
  double sum = 0, squares = 0;
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t i = 0; i < image; ++i) sum += input[n * stride + i];
  *mean = sum / (batch * image);
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t i = 0; i < image; ++i) {
      const float deviation = input[n * stride + i] - *mean;
      squares += deviation * deviation;
    }
  *deviations = squares;
}

std::tuple<Tensor, Tensor> batch_norm_statistics(
    const Tensor& input, const Optional& running_mean, const Optional& running_var, double momentum, double eps) {
  TORCH_CHECK(input.scalar_type() == at::kFloat && input.is_contiguous(input.suggest_memory_format()));
  const int64_t channels = input.size(1), batch = input.size(0), count = input.numel() / channels;
  const int64_t image = count / batch;
  Tensor mean = at::empty({channels}, input.options()), invstd = at::empty({channels}, input.options());
  float *means = mean.mutable_data_ptr<float>(), *invstds = invstd.mutable_data_ptr<float>();
  float* running_means = running_mean ? running_mean->mutable_data_ptr<float>() : nullptr;
  float* running_vars = running_var ? running_var->mutable_data_ptr<float>() : nullptr;
  const float *values = input.const_data_ptr<float>(), share = momentum;

  const bool by_channel = image != 1 && input.suggest_memory_format() == at::MemoryFormat::Contiguous;
  if (!by_channel) at::native::batch_norm_cpu_collect_stats_stub(at::kCPU, mean, invstd, input);

  auto range = [&](int64_t first, int64_t end) {
    for (int64_t c = first; by_channel && c < end;) {
      const bool several = c + kTogether <= end;
      (several ? moments : moments_of_one)(
          values + c * image, batch, channels * image, image, means + c, invstds + c);
      c += several ? kTogether : 1;
    }
    for (int64_t c = first; c < end; ++c) {
      const float deviations = invstds[c];
      const double var = deviations / count, unbiased = deviations / (count - 1);
      invstds[c] = var != 0 || eps != 0 ? 1 / std::sqrt(var + eps) : 0;
      if (running_means) running_means[c] = share * means[c] + (1 - share) * running_means[c];
      if (running_vars) running_vars[c] = share * unbiased + (1 - share) * running_vars[c];
    }
  };
  auto all = at::TensorIterator::nullary_op(mean);  // whose loop runs on PyTorch's threads
  all.for_each(
      [&](char** data, const int64_t*, int64_t size) {
        const int64_t first = reinterpret_cast<float*>(data[0]) - means;
        range(first, first + size);
      },
      kTogether);
  return {mean, invstd};
}

Tensor batch_norm_normalize(
    const Tensor& input, const Optional& weight, const Optional& bias, const Tensor& mean, const Tensor& invstd) {
  TORCH_CHECK(input.is_contiguous(input.suggest_memory_format()));
  Tensor output = at::empty_like(input, input.suggest_memory_format());
  at::native::batch_norm_cpu_stub(
      at::kCPU, output, input, defined(weight), defined(bias), mean, invstd, Tensor(), Tensor(), true, 0.0);
  return output;
}

Three batch_norm_backward_out(
    const Tensor& gradient, const Tensor& input, const Optional& weight, const Optional& running_mean,
    const Optional& running_var, const Optional& mean, const Optional& invstd, bool train, double eps,
    std::array<bool, 3> mask, Tensor& out) {
  if (!alike(gradient, input) || !alike(input, out)) {
    auto [of_input, of_weight, of_bias] = at::native_batch_norm_backward(
        gradient, input, weight, running_mean, running_var, mean, invstd, train, eps, mask);
    out.copy_(of_input);
    return {out, of_weight, of_bias};
  }
  const auto options = weight ? weight->options() : input.options();
  Tensor of_weight = at::empty({input.size(1)}, options), of_bias = at::empty({input.size(1)}, options);
  at::native::batch_norm_cpu_backward_stub(
      at::kCPU, out, of_weight, of_bias, gradient, input, defined(weight), defined(running_mean), defined(running_var),
      defined(mean), defined(invstd), train, eps);
  return {out, of_weight, of_bias};
}

Three batch_norm_backward(
    const Tensor& gradient, const Tensor& input, const Optional& weight, const Optional& running_mean,
    const Optional& running_var, const Optional& mean, const Optional& invstd, bool train, double eps,
    std::array<bool, 3> mask) {
  Tensor out = at::empty_like(input);
  return batch_norm_backward_out(
      gradient, input, weight, running_mean, running_var, mean, invstd, train, eps, mask, out);
}

}  // namespace

TORCH_LIBRARY_IMPL(olla, CPU, library) {
  library.impl("batch_norm_statistics", batch_norm_statistics);
  library.impl("batch_norm_normalize", batch_norm_normalize);
  library.impl("batch_norm_backward", batch_norm_backward);
  library.impl("batch_norm_backward.out", batch_norm_backward_out);
}
