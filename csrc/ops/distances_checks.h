// From tensors to DistancesArgs: the checks that both backends share.
#pragma once

#include "checks.h"
#include "distances_args.h"

namespace coded_torch {

// A call ready to launch: the tensor for the result, and what the kernels need to know.
struct DistancesCall {
  Tensor out;
  DistancesArgs args;
};

inline DistancesCall prepare_products(const char* op, const Tensor& rows) {
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

inline DistancesCall prepare_distances(const Tensor& rows, const Tensor& squares, double nothing) {
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

}  // namespace coded_torch
