// What crosses from squared_distances and inner_products to their kernels.
#pragma once

#include <cstdint>

namespace coded_torch {

struct DistancesArgs {
  const void* rows;  // [n, stride]
  int64_t stride;
  const void* squares;  // [n]; of distances only
  void* out;            // [n, n]
  int64_t num_rows;     // n
  int64_t num_columns;  // of the rows, at most the stride
  double nothing;       // likewise
};

}  // namespace coded_torch
