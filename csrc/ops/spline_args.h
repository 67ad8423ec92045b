// What crosses from the operators to the kernels: pointers, sizes, strides in elements.
#pragma once

#include <cstdint>

namespace coded_torch {

struct SplineArgs {
  const void* in;  // [rows in, G, m], columns contiguous
  int64_t in_row_stride;
  int64_t in_group_stride;
  void* out;  // [rows out, G, m], columns contiguous
  int64_t out_row_stride;
  int64_t out_group_stride;
  const void* coefficients;     // [P, 12 n + 4 N] in the accumulation type, P = 1 or G
  int64_t coefficients_stride;  // 0 where one plan serves all groups
  const int32_t* schedule;      // [P, n + 1 + N]
  int64_t schedule_stride;
  int64_t num_knots;    // n
  int64_t num_groups;   // G
  int64_t num_columns;  // m
};

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

}  // namespace coded_torch
