// matern52_out on the CPU. A number's result depends on nothing but the number.
#include <torch/csrc/stable/library.h>

#include "../matern_checks.h"
#include "capabilities.h"

namespace coded_torch {

// A thread is worth waking for this many numbers.
constexpr int64_t kNumbersPerThread = int64_t{1} << 15;

static void run_matern(const MaternKernels& kernels, const Tensor& squared, double scale,
                       const Tensor& out) {
  const MaternArgs args = matern_args(squared, scale, out);
  const bool wide = squared.scalar_type() == ScalarType::Double;
  const MaternFunction run = wide ? kernels.float64 : kernels.float32;
  torch::stable::parallel_for(0, args.count, kNumbersPerThread,
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

void matern52_out_cpu(const Tensor& squared, double scale, const Tensor& out) {
  run_matern(*capabilities().front().matern, squared, scale, out);
}

void matern52_out_with_cpu(const Tensor& squared, double scale, const Tensor& out,
                           const std::string& capability) {
  run_matern(*capability_of("matern52_out_with", capability).matern, squared, scale, out);
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("matern52_out", TORCH_BOX(&matern52_out_cpu));
  m.impl("matern52_out_with", TORCH_BOX(&matern52_out_with_cpu));
}

}  // namespace coded_torch
