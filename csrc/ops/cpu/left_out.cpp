// left_out_losses, on the CPU only: results come to the host to be compared.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "../checks.h"
#include "capabilities.h"

namespace coded_torch {

constexpr int64_t kLineFloats = 16;        // of 64 bytes, the widest vector
constexpr double kLeastPrecision = 1e-12;  // a single result has 0
// A thread is worth waking for this many multiplications.
constexpr int64_t kProductsPerThread = int64_t{1} << 18;

static int64_t padded(int64_t count) {
  return (count + kLineFloats - 1) / kLineFloats * kLineFloats;
}

// Turns the precisions of one length into losses.
static void write_losses(const float* squares, int64_t n, int64_t num_columns, double* losses) {
  double mean = 0;
  for (int64_t j = 0; j < n; ++j) {
    losses[j] = std::max(losses[j], kLeastPrecision);
    mean += squares[j] / num_columns / losses[j] / n;
  }
  mean = std::max(mean, 1e-300);
  for (int64_t j = 0; j < n; ++j) {
    const double square = squares[j] / num_columns / losses[j];
    losses[j] = (square / mean + std::log(mean) - 1 - std::log(losses[j])) / 2;
  }
}

Tensor left_out_losses_cpu(const Tensor& squared, const Tensor& scales, const Tensor& results,
                           double nugget) {
  const auto is = [](const Tensor& tensor, ScalarType dtype, int64_t dim) {
    return tensor.scalar_type() == dtype && tensor.dim() == dim && tensor.is_contiguous() &&
           tensor.is_cpu();
  };
  STD_TORCH_CHECK(is(squared, ScalarType::Float, 2) && is(scales, ScalarType::Double, 1) &&
                      is(results, ScalarType::Float, 2) && squared.size(0) == results.size(1) &&
                      squared.size(1) == results.size(1),
                  "left_out_losses: squared_distances, scales and results must be contiguous on "
                  "the CPU, float32 [n, n], float64 [K] and float32 [C, n], got ",
                  shape_str(squared), ", ", shape_str(scales), " and ", shape_str(results));
  const int64_t num_lengths = scales.size(0), n = results.size(1), columns = results.size(0);
  const Tensor out =
      torch::stable::empty({num_lengths, n}, ScalarType::Double, std::nullopt, squared.device());
  if (n == 0) return out;
  const LeftOutArgs args{static_cast<const float*>(squared.const_data_ptr()),
                         static_cast<const double*>(scales.const_data_ptr()),
                         static_cast<const float*>(results.const_data_ptr()),
                         n,
                         columns,
                         static_cast<float>(nugget)};
  auto* losses = static_cast<double*>(out.mutable_data_ptr());
  const LeftOutFunction run = chosen_capability().load()->left_out;
  const int64_t stride = padded(n), wide = padded(columns),
                grain = kProductsPerThread / (n * n * n);
  torch::stable::parallel_for(
      0, num_lengths, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
        // Three rows behind the matrix are read, and nothing is made of them.
        const int64_t floats = (n + 3) * stride + 4 * stride + 2 * n * wide;
        const std::unique_ptr<float, decltype(&std::free)> memory(
            static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))), &std::free);
        STD_TORCH_CHECK(memory, "left_out_losses: out of memory");
        std::fill_n(memory.get(), floats, 0.0f);
        float* at = memory.get() + (n + 3) * stride;
        LeftOutSpace space{memory.get(),
                           at,
                           at + stride,
                           at + 2 * stride,
                           at + 3 * stride,
                           at + 4 * stride,
                           at + 4 * stride + n * wide,
                           nullptr,
                           stride,
                           wide};
        for (int64_t k = begin; k < end; ++k) {
          space.precisions = losses + k * n;
          if (run(args, k, space)) {
            write_losses(space.squares, n, columns, losses + k * n);
          } else {
            std::fill_n(losses + k * n, n, std::numeric_limits<double>::infinity());
          }
        }
      });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("left_out_losses", TORCH_BOX(&left_out_losses_cpu));
}

}  // namespace coded_torch
