// The arguments of left_out_losses, as its kernels see them.
#pragma once

#include <cstdint>

namespace coded_torch {

struct LeftOutArgs {
  const float* squared;  // [n, n]
  const double* scales;  // [K], sqrt(5) / length
  const float* results;  // [C, n]
  int64_t num_results;   // n
  int64_t num_columns;   // C
  float nugget;
};

}  // namespace coded_torch
