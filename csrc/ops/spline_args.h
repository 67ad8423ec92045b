// What crosses from the operators to the kernels: pointers, sizes, strides in elements.
#pragma once

#include <cstdint>

#include "../math/pack.h"

namespace coded_torch {

// Which row of a tensor is row i of group g: i itself, or what an index says.
struct RowIndex {
  const int64_t* rows;  // [rows, G] contiguous; null where there is no index
  int64_t num_groups;   // G
  int64_t num_rows;     // of the tensor

  // Less than 0 where the group has no such row. An index out of bounds counts as none, so that no
  // kernel reads or writes out of bounds; the CPU operator refuses it beforehand.
  CODED_TORCH_HD int64_t at(int64_t i, int64_t group) const {
    if (rows == nullptr) return i;
    const int64_t row = rows[i * num_groups + group];
    return row < num_rows ? row : -1;
  }
};

struct SplineArgs {
  const void* in;  // [rows in, G, m], or [R, m] with an index; columns contiguous
  int64_t in_row_stride;
  int64_t in_group_stride;  // 0 with an index
  RowIndex gather;
  void* out;  // [rows out, G, m], or [R', m] with an index; columns contiguous
  int64_t out_row_stride;
  int64_t out_group_stride;  // 0 with an index
  RowIndex scatter;
  const void* coefficients;     // [P, 12 n + 4 N] in the accumulation type, P = 1 or G
  int64_t coefficients_stride;  // 0 where one plan serves all groups
  const void* matrix;           // [n, N], likewise; null where the plans come without, or P > 1
  const int32_t* schedule;      // [P, n + 1 + N]
  int64_t schedule_stride;
  int64_t num_knots;    // n
  int64_t num_points;   // N
  int64_t num_groups;   // G
  int64_t num_columns;  // m
};

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

}  // namespace coded_torch
