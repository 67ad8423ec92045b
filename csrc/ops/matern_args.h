// What crosses from operators to the kernels of the Matern covariance.
#pragma once

#include <cstdint>

namespace coded_torch {

struct MaternArgs {
  const void* squared;  // [count]
  void* out;            // [count], the same memory or other
  int64_t count;
  double scale;  // sqrt(5) / length
};

}  // namespace coded_torch
