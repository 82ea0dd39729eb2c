// Maxima of windows on the CPU, of the same bits as PyTorch's operators: with the places that they come from, each a
// byte, or without.

#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kTogether = __BIGGEST_ALIGNMENT__ / sizeof(float);  // maxima: what fits into a vector
typedef float Floats __attribute__((vector_size(kTogether * sizeof(float))));
typedef int32_t Places __attribute__((vector_size(kTogether * sizeof(int32_t))));

constexpr int64_t kWork = 1 << 15;  // comparisons that another thread is worth
constexpr float kLeast = -std::numeric_limits<float>::infinity();

// The windows of an image, and how it is laid out for them: columns that are a stride apart lie side by side, so that
// neighbouring windows compare neighbours, and beyond its edges is what is less than all.
struct Windows {
  int64_t height, width, rows, columns;  // of the image, and of its maxima
  int64_t kernel_height, kernel_width, stride_height, stride_width, top, left;
  int64_t part, row;  // floats that are laid out, for columns that are a stride apart, and for all

  Windows(IntArrayRef image, IntArrayRef maxima, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding)
      : height(image[0]), width(image[1]), rows(maxima[0]), columns(maxima[1]), kernel_height(kernel[0]),
        kernel_width(kernel[1]), stride_height(stride[0]), stride_width(stride[1]), top(padding[0]), left(padding[1]) {
    const int64_t read = (columns + kTogether - 1) / kTogether * kTogether + (kernel_width - 1) / stride_width;
    part = std::max(read, (left + width - 1) / stride_width + 1);
    row = part * stride_width;
  }
};

void lay_out(const Windows& w, const float* image, float* laid_out) {
  for (int64_t y = 0; y < w.height; ++y, image += w.width)
    for (int64_t phase = 0; phase < w.stride_width; ++phase, laid_out += w.part) {
      const int64_t first = std::max<int64_t>(0, w.left - phase + w.stride_width - 1) / w.stride_width;
      const int64_t end = std::max(first, (w.left + w.width - 1 - phase + w.stride_width) / w.stride_width);
      const float* column = image + first * w.stride_width + phase - w.left;
      if (w.stride_width == 1)
        std::memcpy(laid_out + first, column, (end - first) * sizeof(float));
      else if (w.stride_width == 2)
        for (int64_t i = 0; i < end - first; ++i) laid_out[first + i] = column[2 * i];
      else
        for (int64_t i = 0; i < end - first; ++i) laid_out[first + i] = column[i * w.stride_width];
    }
}

// Of each window, the first of the largest from left to right and from top to bottom, or the last that is no number.
template <bool with_places>
void find_maxima(const Windows& w, const float* laid_out, float* maxima, uint8_t* places) {
  for (int64_t y = 0; y < w.rows; ++y) {
    const int64_t first = std::max<int64_t>(0, w.top - y * w.stride_height);
    const int64_t end = std::min(w.kernel_height, w.top + w.height - y * w.stride_height);
    for (int64_t x = 0; x < w.columns; x += kTogether) {
      Floats best = Floats{} + kLeast;
      Places from{};
      for (int64_t i = 0; i < kTogether; ++i)
        from[i] = first * w.kernel_width + std::max<int64_t>(0, w.left - (x + i) * w.stride_width);
      for (int64_t ky = first; ky < end; ++ky) {
        const float* row = laid_out + (y * w.stride_height - w.top + ky) * w.row + x;
        for (int64_t kx = 0, phase = 0, further = 0; kx < w.kernel_width; ++kx) {
          Floats values;
          std::memcpy(&values, row + phase * w.part + further, sizeof(values));
          if (++phase == w.stride_width) phase = 0, ++further;
          const Places is_larger = (values > best) | (values != values);
          best = is_larger ? values : best;
          if (with_places) from = is_larger ? Places{} + static_cast<int32_t>(ky * w.kernel_width + kx) : from;
        }
      }
      const int64_t count = std::min(kTogether, w.columns - x);
      std::memcpy(maxima, &best, count * sizeof(float));
      maxima += count;
      for (int64_t i = 0; with_places && i < count; ++i) *places++ = from[i];
    }
  }
}

void maxima_of(const Windows& w, const float* image, float* laid_out, float* maxima, uint8_t* places) {
  lay_out(w, image, laid_out);
  if (places == nullptr)
    find_maxima<false>(w, laid_out, maxima, places);
  else
    find_maxima<true>(w, laid_out, maxima, places);
}

// Every window's gradient, added where its maximum comes from.
void add_gradients(const Windows& w, const float* gradients, const uint8_t* places, float* image) {
  std::array<int64_t, 256> away;  // of a place, from the first one
  for (int64_t place = 0; place < w.kernel_height * w.kernel_width; ++place)
    away[place] = place / w.kernel_width * w.width + place % w.kernel_width;
  for (int64_t y = 0; y < w.rows; ++y) {
    float* window = image + (y * w.stride_height - w.top) * w.width - w.left;
    for (int64_t x = 0; x < w.columns; ++x, window += w.stride_width) window[away[*places++]] += *gradients++;
  }
}

// Calls ``work`` with ranges of the images of ``batch``, on PyTorch's threads.
template <typename Work>
void for_images(const Tensor& batch, int64_t work_of_one, const Work& work) {
  const int64_t image = batch.size(-1) * batch.size(-2);
  const auto* start = static_cast<const char*>(batch.const_data_ptr());
  Tensor firsts = batch.view({-1, image}).select(1, 0);
  at::TensorIterator::nullary_op(firsts).for_each(
      [&](char** data, const int64_t*, int64_t count) {
        const int64_t first = (data[0] - start) / (image * static_cast<int64_t>(batch.element_size()));
        work(first, first + count);
      },
      std::max<int64_t>(1, kWork / work_of_one));
}

std::vector<int64_t> shape_of(const Tensor& tensor, IntArrayRef size) {
  std::vector<int64_t> shape = tensor.sizes().vec();
  std::copy(size.begin(), size.end(), shape.end() - 2);
  return shape;
}

Tensor find(
    const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef size,
    const Tensor* places) {
  TORCH_CHECK(input.scalar_type() == at::kFloat && input.is_contiguous());
  const Windows windows(input.sizes().slice(input.dim() - 2), size, kernel, stride, padding);
  const Tensor output = at::empty(shape_of(input, size), input.options());
  const int64_t image = windows.height * windows.width, maxima = windows.rows * windows.columns;
  const float* images = input.const_data_ptr<float>();
  float* found = output.mutable_data_ptr<float>();
  uint8_t* from = places ? places->mutable_data_ptr<uint8_t>() : nullptr;
  for_images(output, maxima * kernel[0] * kernel[1], [&](int64_t first, int64_t end) {
    std::vector<float> laid_out(windows.height * windows.row, kLeast);
    for (int64_t i = first; i < end; ++i)
      maxima_of(windows, images + i * image, laid_out.data(), found + i * maxima, from ? from + i * maxima : nullptr);
  });
  return output;
}

Tensor max_pool2d(
    const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef size) {
  return find(input, kernel, stride, padding, size, nullptr);
}

std::tuple<Tensor, Tensor> max_pool2d_with_places(
    const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef size) {
  const Tensor places = at::empty(shape_of(input, size), input.options().dtype(at::kByte));
  return {find(input, kernel, stride, padding, size, &places), places};
}

Tensor max_pool2d_backward(
    const Tensor& gradient, const Tensor& places, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef size) {
  TORCH_CHECK(gradient.scalar_type() == at::kFloat && gradient.sizes() == places.sizes());
  const Windows windows(size, gradient.sizes().slice(gradient.dim() - 2), kernel, stride, padding);
  const Tensor gradients = gradient.contiguous();
  const Tensor result = at::empty(shape_of(gradient, size), gradient.options());
  const int64_t image = windows.height * windows.width, maxima = windows.rows * windows.columns;
  const float* given = gradients.const_data_ptr<float>();
  const uint8_t* from = places.const_data_ptr<uint8_t>();
  float* images = result.mutable_data_ptr<float>();
  for_images(result, image + maxima, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      std::fill_n(images + i * image, image, 0.0f);
      add_gradients(windows, given + i * maxima, from + i * maxima, images + i * image);
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(olla, CPU, library) {
  library.impl("max_pool2d", max_pool2d);
  library.impl("max_pool2d_with_places", max_pool2d_with_places);
  library.impl("max_pool2d_backward", max_pool2d_backward);
}
