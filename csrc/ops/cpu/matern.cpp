// matern52_out and matern52_among on the CPU. A number's result depends on nothing but the number.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../matern_checks.h"
#include "capabilities.h"
#include "huge_pages.h"

namespace coded_torch {

// A thread is worth waking for this many numbers.
constexpr int64_t kNumbersPerThread = int64_t{1} << 15;

void matern52_out_cpu(const Tensor& squared, double scale, const Tensor& out) {
  const MaternArgs args = matern_args(squared, scale, out);
  const MaternKernels& kernels = *chosen_capability().load()->matern;
  const MaternFunction run = kernels.run[squared.scalar_type() == ScalarType::Float];
  torch::stable::parallel_for(0, args.count, kNumbersPerThread,
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

static void check_indices(const Tensor& index, int64_t size) {
  const auto* indices = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < index.numel(); ++i) {
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < size,
                    "matern52_among: rows and columns must lie in 0..", size - 1, ", got ",
                    indices[i]);
  }
}

Tensor matern52_among_cpu(const Tensor& squared, const Tensor& rows, const Tensor& columns,
                          double scale) {
  const MaternAmongCall call = prepare_among(squared, rows, columns, scale);
  const MaternAmongArgs& args = call.args;
  check_indices(rows, squared.size(0));
  check_indices(columns, squared.size(1));
  if (args.num_columns == 0) return call.out;
  ask_for_huge_pages(args.out, call.out.numel() * static_cast<int64_t>(call.out.element_size()));
  const MaternKernels& kernels = *chosen_capability().load()->matern;
  const MaternAmongFunction run = kernels.run_among[squared.scalar_type() == ScalarType::Float];
  torch::stable::parallel_for(0, args.num_rows,
                              std::max<int64_t>(1, kNumbersPerThread / args.num_columns),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("matern52_among", TORCH_BOX(&matern52_among_cpu));
  m.impl("matern52_out", TORCH_BOX(&matern52_out_cpu));
}

}  // namespace coded_torch
