// What crosses from left_out_losses to its kernels.
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
