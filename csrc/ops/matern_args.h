// What crosses from matern52_out and matern52_among to their kernels.
#pragma once

#include <cstdint>

namespace coded_torch {

struct MaternArgs {
  const void* squared;  // [count]
  void* out;            // [count], the same memory or other
  int64_t count;
  double scale;  // sqrt(5) / length
};

// Of some rows and columns of a matrix.
struct MaternAmongArgs {
  const void* squared;  // [n, stride]
  int64_t stride;
  const int64_t* rows;     // [num_rows]
  const int64_t* columns;  // [num_columns]
  void* out;               // [num_rows, num_columns]
  int64_t num_rows;
  int64_t num_columns;
  double scale;
};

}  // namespace coded_torch
