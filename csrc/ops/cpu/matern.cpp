// matern52_out and matern52_among on the CPU. A number's result depends on nothing but the number.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../checks.h"
#include "../matern_args.h"
#include "capabilities.h"
#include "huge_pages.h"

namespace coded_torch {

static void check_matern(const char* op, const Tensor& squared) {
  const ScalarType dtype = squared.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float, op,
                  ": squared_distances must be float64 or float32, got ",
                  torch::headeronly::toString(dtype));
}

static MaternArgs matern_args(const Tensor& squared, double scale, const Tensor& out) {
  const ScalarType dtype = squared.scalar_type();
  check_matern("matern52_out", squared);
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

// A call ready to launch: the tensor for the result, and what the kernels need to know.
struct MaternAmongCall {
  Tensor out;
  MaternAmongArgs args;
};

static MaternAmongCall prepare_among(const Tensor& squared, const Tensor& rows,
                                     const Tensor& columns, double scale) {
  check_matern("matern52_among", squared);
  STD_TORCH_CHECK(squared.dim() == 2 && squared.is_contiguous(),
                  "matern52_among: squared_distances must be a contiguous matrix, got ",
                  shape_str(squared));
  for (const Tensor& index : {rows, columns}) {
    STD_TORCH_CHECK(index.dim() == 1 && index.is_contiguous() &&
                        index.scalar_type() == ScalarType::Long &&
                        index.device() == squared.device(),
                    "matern52_among: rows and columns must be contiguous int64 vectors on the "
                    "device of the squared distances, got ",
                    torch::headeronly::toString(index.scalar_type()), " ", shape_str(index));
  }
  const Tensor out = torch::stable::empty({rows.size(0), columns.size(0)}, squared.scalar_type(),
                                          std::nullopt, squared.device());
  return {out,
          {squared.const_data_ptr(), squared.size(1),
           static_cast<const int64_t*>(rows.const_data_ptr()),
           static_cast<const int64_t*>(columns.const_data_ptr()), out.mutable_data_ptr(),
           rows.size(0), columns.size(0), scale}};
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
