// How well rows are estimated from those near them on a path, on the CPU only. coded_torch/ops.py
// says what the operator returns.
#include <torch/csrc/stable/library.h>

#include "regression.h"

namespace coded_torch {

// The variance of each row estimated from those near it on a path through all rows, float64, [n].
// Rows are cut into as few parts of the path as `most` rows in a part allow, at most 512.
Tensor path_variances_cpu(const Tensor& squared, double length, const Tensor& order, int64_t most,
                          double nugget) {
  STD_TORCH_CHECK(most > 0 && most <= kAllLeftOut, "path_variances: most must be 1 to ",
                  kAllLeftOut, ", got ", most);
  const int64_t n = order.numel(), parts = (n + most - 1) / most;
  check_indices("path_variances", order, n);
  const Tensor out = new_tensor({n}, ScalarType::Double), none = rows_of(order, 0, 0);
  for (int64_t part = 0, first = 0; part < parts; ++part) {
    const int64_t count = n / parts + (part < n % parts);
    const Regression process =
        regress_cpu(squared, length, rows_of(order, first, count), none, nugget);
    for (int64_t i = 0; i < count; ++i, ++first) {
      numbers<double>(out)[numbers<int64_t>(order)[first]] =
          numbers<double>(process[kLeftOutVariances])[i];
    }
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("path_variances", TORCH_BOX(&path_variances_cpu));
}

}  // namespace coded_torch
