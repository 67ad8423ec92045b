// matern52_out on the CPU. A number's result depends on nothing but the number.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../matern_args.h"
#include "capabilities.h"

namespace coded_torch {

static MaternArgs matern_args(const Tensor& squared, double scale, const Tensor& out) {
  const ScalarType dtype = squared.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float,
                  "matern52_out: squared_distances must be float64 or float32, got ",
                  torch::headeronly::toString(dtype));
  bool same =
      out.dim() == squared.dim() && out.scalar_type() == dtype && out.device() == squared.device();
  for (int64_t i = 0; same && i < out.dim(); ++i) same = out.size(i) == squared.size(i);
  STD_TORCH_CHECK(same,
                  "matern52_out: out must have the shape, the dtype and the device of the squared "
                  "distances, got ",
                  torch::headeronly::toString(out.scalar_type()), " ", shape_str(out), " for ",
                  torch::headeronly::toString(dtype), " ", shape_str(squared));
  STD_TORCH_CHECK(squared.is_contiguous() && out.is_contiguous(),
                  "matern52_out: squared_distances and out must be contiguous");
  const Span from = span_of(squared), to = span_of(out);
  STD_TORCH_CHECK(
      from.begin == to.begin || to.end <= from.begin || from.end <= to.begin,
      "matern52_out: out must be the memory of the squared distances, or apart from it");
  return {squared.const_data_ptr(), out.mutable_data_ptr(), squared.numel(), scale};
}

// A thread is worth waking for this many numbers.
constexpr int64_t kNumbersPerThread = int64_t{1} << 15;

void matern52_out_cpu(const Tensor& squared, double scale, const Tensor& out) {
  const MaternArgs args = matern_args(squared, scale, out);
  const MaternKernels& kernels = *chosen_capability().load()->matern;
  const MaternFunction run = kernels.run[squared.scalar_type() == ScalarType::Float];
  torch::stable::parallel_for(0, args.count, kNumbersPerThread,
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("matern52_out", TORCH_BOX(&matern52_out_cpu));
}

}  // namespace coded_torch
