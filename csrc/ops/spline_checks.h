// From tensors to SplineArgs: the checks that both backends share. User errors are raised in
// Python; these are the last line, and keep a kernel from reading or writing out of bounds. What
// the schedule and the indices hold, only the CPU operator looks at: on a device it would have to
// wait.
#pragma once

#include <optional>
#include <vector>

#include "../math/spline_layout.h"
#include "checks.h"
#include "spline_args.h"

namespace coded_torch {

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

// Which rows of `values` the groups read and which of the result they write; none: all, in order.
struct RowIndices {
  std::optional<Tensor> gather;   // [rows in, G]
  std::optional<Tensor> scatter;  // [rows out, G]
  std::optional<int64_t> num_rows;
};

inline RowIndex row_index(const std::optional<Tensor>& index, int64_t num_rows) {
  if (!index) return {nullptr, 0, num_rows};
  return {static_cast<const int64_t*>(index->const_data_ptr()), index->size(1), num_rows};
}

inline std::optional<Tensor> check_index(const char* name, const std::optional<Tensor>& index,
                                         const Tensor& values) {
  if (!index) return index;
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long && index->dim() == 2,
                  "spline_apply: ", name, " must be int64 [rows, groups], got ",
                  torch::headeronly::toString(index->scalar_type()), " ", shape_str(*index));
  STD_TORCH_CHECK(index->device() == values.device(), "spline_apply: ", name,
                  " must be on the device of the values");
  return torch::stable::contiguous(*index);
}

// A call ready to launch: the tensors that own the memory, and what the kernels need to know.
struct SplineCall {
  Tensor values;
  RowIndices indices;
  Tensor out;
  DType dtype;
  SplineArgs args;
};

inline SplineCall prepare_spline(Tensor values, const Tensor& coefficients, const Tensor& schedule,
                                 bool transpose, RowIndices indices) {
  indices.gather = check_index("gather", indices.gather, values);
  indices.scatter = check_index("scatter", indices.scatter, values);
  const bool gathers = indices.gather.has_value(), scatters = indices.scatter.has_value();
  STD_TORCH_CHECK(values.dim() == (gathers ? 2 : 3), "spline_apply: values must be ",
                  gathers ? "[rows, columns] with gather" : "[rows, groups, columns]", ", got ",
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
  const Tensor& grouped = gathers ? *indices.gather : values;
  const int64_t rows = grouped.size(0), groups = grouped.size(1);
  const int64_t columns = values.size(values.dim() - 1);
  STD_TORCH_CHECK(
      coefficients.dim() == 2 && schedule.dim() == 2 && coefficients.is_contiguous() &&
          schedule.is_contiguous() && coefficients.size(0) == schedule.size(0) &&
          (coefficients.size(0) == 1 || coefficients.size(0) == groups),
      "spline_apply: coefficients and schedule must be contiguous, a row for all groups ",
      "or one for each of ", groups, ", got ", shape_str(coefficients), " and ",
      shape_str(schedule));
  // A schedule row holds n + 1 + N numbers; the rows in are n, or N for the transpose.
  const int64_t out_rows = schedule.size(1) - 1 - rows;
  const int64_t num_knots = transpose ? out_rows : rows;
  const int64_t num_points = transpose ? rows : out_rows;
  const int64_t of_sweeps = coefficients_size(num_knots, num_points);
  const bool has_matrix = coefficients.size(1) > of_sweeps;
  STD_TORCH_CHECK(
      num_knots >= 1 && num_points >= 0 &&
          coefficients.size(1) == of_sweeps + (has_matrix ? matrix_size(num_knots, num_points) : 0),
      "spline_apply: ", gathers ? "gather " : "values ", shape_str(grouped), ", coefficients ",
      shape_str(coefficients), " and schedule ", shape_str(schedule), " do not fit together",
      transpose ? " (transpose)" : "");
  STD_TORCH_CHECK((scatters || !indices.num_rows) && indices.num_rows.value_or(0) >= 0,
                  "spline_apply: num_rows must be at least 0, and given with scatter only");
  STD_TORCH_CHECK(
      !scatters || (indices.scatter->size(0) == out_rows && indices.scatter->size(1) == groups),
      "spline_apply: scatter must be [", out_rows, ", ", groups, "], got ",
      scatters ? shape_str(*indices.scatter) : "none");
  const std::vector<int64_t> out_shape =
      scatters ? std::vector<int64_t>{indices.num_rows.value_or(out_rows * groups), columns}
               : std::vector<int64_t>{out_rows, groups, columns};
  if (columns > 1 && values.stride(values.dim() - 1) != 1) {
    values = torch::stable::contiguous(values);
  }
  const Tensor out =
      torch::stable::empty(out_shape, values.scalar_type(), std::nullopt, values.device());
  SplineArgs args{};
  args.in = values.const_data_ptr();
  args.in_row_stride = values.stride(0);
  args.in_group_stride = gathers ? 0 : values.stride(1);
  args.gather = row_index(indices.gather, values.size(0));
  args.out = out.mutable_data_ptr();
  args.out_row_stride = out.stride(0);
  args.out_group_stride = scatters ? 0 : out.stride(1);
  args.scatter = row_index(indices.scatter, out.size(0));
  args.coefficients = coefficients.const_data_ptr();
  args.schedule = static_cast<const int32_t*>(schedule.const_data_ptr());
  args.num_knots = num_knots;
  args.num_points = num_points;
  if (has_matrix && coefficients.size(0) == 1) {
    args.matrix = static_cast<const char*>(args.coefficients) +
                  of_sweeps * static_cast<int64_t>(coefficients.element_size());
  }
  args.num_groups = groups;
  args.num_columns = columns;
  if (coefficients.size(0) > 1) {
    args.coefficients_stride = coefficients.size(1);
    args.schedule_stride = schedule.size(1);
  } else if (!gathers && !scatters && args.in_group_stride == columns &&
             args.out_group_stride == columns) {
    // One plan, and the groups side by side: one wide group.
    args.num_columns = groups * columns;
    args.num_groups = args.num_columns > 0 ? 1 : 0;
  }
  return {values, indices, out, dtype, args};
}

}  // namespace coded_torch
