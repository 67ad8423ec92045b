// From tensors to SplineArgs: the checks that both backends share. User errors are raised in
// Python; these are the last line, and keep a kernel from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>

#include "../math/spline_plan.h"
#include "spline_args.h"

namespace coded_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_str(const Tensor& tensor) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << "]";
  return out.str();
}

inline DType spline_dtype(const Tensor& values) {
  switch (values.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false,
                      "spline_apply: values must be float64, float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(values.scalar_type()));
  }
}

// A call ready to launch: the tensors that own the memory, and what the kernels need to know.
struct SplineCall {
  Tensor values;
  Tensor out;
  DType dtype;
  SplineArgs args;
};

inline SplineCall prepare_spline(Tensor values, const Tensor& coefficients, const Tensor& schedule,
                                 bool transpose) {
  STD_TORCH_CHECK(values.dim() == 3, "spline_apply: values must be [rows, groups, columns], got ",
                  shape_str(values));
  const DType dtype = spline_dtype(values);
  const ScalarType acc = dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(coefficients.scalar_type() == acc, "spline_apply: coefficients must be ",
                  torch::headeronly::toString(acc), " for these values, got ",
                  torch::headeronly::toString(coefficients.scalar_type()));
  STD_TORCH_CHECK(schedule.scalar_type() == ScalarType::Int,
                  "spline_apply: schedule must be int32, got ",
                  torch::headeronly::toString(schedule.scalar_type()));
  STD_TORCH_CHECK(coefficients.device() == values.device() && schedule.device() == values.device(),
                  "spline_apply: coefficients and schedule must be on the device of the values");
  const int64_t rows = values.size(0), groups = values.size(1), columns = values.size(2);
  STD_TORCH_CHECK(
      coefficients.dim() == 2 && schedule.dim() == 2 && coefficients.is_contiguous() &&
          schedule.is_contiguous() && coefficients.size(0) == schedule.size(0) &&
          (coefficients.size(0) == 1 || coefficients.size(0) == groups),
      "spline_apply: coefficients and schedule must be contiguous, a row for all groups ",
      "or one for each of ", groups, ", got ", shape_str(coefficients), " and ",
      shape_str(schedule));
  // A schedule row holds n + 1 + N numbers; the rows of the values are n, or N for the transpose.
  const int64_t out_rows = schedule.size(1) - 1 - rows;
  const int64_t num_knots = transpose ? out_rows : rows;
  const int64_t num_points = transpose ? rows : out_rows;
  STD_TORCH_CHECK(num_knots >= 1 && num_points >= 0 &&
                      coefficients.size(1) == coefficients_size(num_knots, num_points),
                  "spline_apply: values ", shape_str(values), ", coefficients ",
                  shape_str(coefficients), " and schedule ", shape_str(schedule),
                  " do not fit together", transpose ? " (transpose)" : "");
  if (columns > 1 && values.stride(2) != 1) values = torch::stable::contiguous(values);

  Tensor out = torch::stable::empty({out_rows, groups, columns}, values.scalar_type(), std::nullopt,
                                    values.device());
  SplineArgs args{};
  args.in = values.const_data_ptr();
  args.in_row_stride = values.stride(0);
  args.in_group_stride = values.stride(1);
  args.out = out.mutable_data_ptr();
  args.out_row_stride = groups * columns;
  args.out_group_stride = columns;
  args.coefficients = coefficients.const_data_ptr();
  args.schedule = static_cast<const int32_t*>(schedule.const_data_ptr());
  args.num_knots = num_knots;
  args.num_groups = groups;
  args.num_columns = columns;
  if (coefficients.size(0) > 1) {
    args.coefficients_stride = coefficients.size(1);
    args.schedule_stride = schedule.size(1);
  } else if (args.in_group_stride == columns) {  // one plan, groups side by side: one wide group
    args.num_columns = groups * columns;
    args.num_groups = args.num_columns > 0 ? 1 : 0;
  }
  return {values, out, dtype, args};
}

}  // namespace coded_torch
