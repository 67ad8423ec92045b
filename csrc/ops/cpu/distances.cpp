// squared_distances and inner_products on the CPU: blocks of rows over threads. A pair's result
// depends on nothing but the two rows.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "../checks.h"
#include "../distances_args.h"
#include "capabilities.h"
#include "huge_pages.h"

namespace coded_torch {

// A call ready to launch: the tensor for the result, and what the kernels need to know.
struct DistancesCall {
  Tensor out;
  DistancesArgs args;
};

static DistancesCall prepare_products(const char* op, const Tensor& rows) {
  const ScalarType dtype = rows.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float, op,
                  ": rows must be float64 or float32, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), op,
                  ": rows must be contiguous, [rows, columns], got ", shape_str(rows));
  const int64_t n = rows.size(0);
  const Tensor out = torch::stable::empty({n, n}, dtype, std::nullopt, rows.device());
  return {
      out,
      {rows.const_data_ptr(), rows.size(1), nullptr, out.mutable_data_ptr(), n, rows.size(1), 0}};
}

static DistancesCall prepare_distances(const Tensor& rows, const Tensor& squares, double nothing) {
  DistancesCall call = prepare_products("squared_distances", rows);
  const int64_t n = call.args.num_rows;
  STD_TORCH_CHECK(squares.dim() == 1 && squares.size(0) == n && squares.is_contiguous() &&
                      squares.scalar_type() == rows.scalar_type() &&
                      squares.device() == rows.device(),
                  "squared_distances: squares must be contiguous, [", n,
                  "], of the dtype and the device of the rows, got ",
                  torch::headeronly::toString(squares.scalar_type()), " ", shape_str(squares));
  call.args.squares = squares.const_data_ptr();
  call.args.nothing = nothing;
  return call;
}

constexpr int64_t kRowAlignment = 64;

static Tensor run_pairs(DistancesFunction (DistancesKernels::*kernels)[2], DistancesCall call) {
  DistancesArgs& args = call.args;
  const int64_t n = args.num_rows, value_bytes = static_cast<int64_t>(call.out.element_size());
  if (n == 0) return call.out;
  ask_for_huge_pages(args.out, n * n * value_bytes);
  // As the kernels want them: aligned, with zeros beside them and behind.
  const int64_t row_bytes = args.num_columns * value_bytes;
  const int64_t padded_bytes = (row_bytes / kRowAlignment + 1) * kRowAlignment;
  const std::unique_ptr<char, decltype(&std::free)> padded(
      static_cast<char*>(std::aligned_alloc(kRowAlignment, (n + kDistancesRows) * padded_bytes)),
      &std::free);
  STD_TORCH_CHECK(padded, "squared_distances, inner_products: out of memory for ", n, " rows");
  const char* from = static_cast<const char*>(args.rows);
  for (int64_t i = 0; i < n + kDistancesRows; ++i) {
    const int64_t copied = i < n ? row_bytes : 0;
    char* to = padded.get() + i * padded_bytes;
    if (copied) std::memcpy(to, from + i * row_bytes, copied);
    std::memset(to + copied, 0, padded_bytes - copied);
  }
  args.rows = padded.get();
  args.stride = padded_bytes / value_bytes;
  const DistancesKernels& chosen = *chosen_capability().load()->distances;
  const DistancesFunction run = (chosen.*kernels)[call.out.scalar_type() == ScalarType::Float];
  torch::stable::parallel_for(0, (n + kDistancesBlock - 1) / kDistancesBlock, 1,
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return call.out;
}

Tensor squared_distances_cpu(const Tensor& rows, const Tensor& squares, double nothing) {
  return run_pairs(&DistancesKernels::distances, prepare_distances(rows, squares, nothing));
}

Tensor inner_products_cpu(const Tensor& rows) {
  return run_pairs(&DistancesKernels::products, prepare_products("inner_products", rows));
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("squared_distances", TORCH_BOX(&squared_distances_cpu));
  m.impl("inner_products", TORCH_BOX(&inner_products_cpu));
}

}  // namespace coded_torch
