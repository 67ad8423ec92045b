// Every operator's schema, nothing else.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(coded_torch, m) {
  // values [n, G, m] -> [N, G, m], or [N, G, m] -> [n, G, m] where `transpose`.
  // coefficients [P, 12 n + 4 N], schedule [P, n + 1 + N]: csrc/math/spline_plan.h; P is 1 or G.
  // gather int64 [rows in, G]: values is [R, m], and row i of group g is its row gather[i, g];
  // -1 reads zeros. scatter int64 [rows out, G]: the result is [num_rows, m], and row j of group g
  // becomes its row scatter[j, g]; -1 drops it, no row may be named twice, those not named are 0.
  // Without num_rows, there are as many rows as entries, and every row must be named.
  m.def(
      "spline_apply(Tensor values, Tensor coefficients, Tensor schedule, bool transpose, "
      "Tensor? gather=None, Tensor? scatter=None, SymInt? num_rows=None) -> Tensor");
  // The Matern covariances of smoothness 5/2 of squared distances, any shape, scale = sqrt(5) /
  // length: into `out`, of the same shape, both contiguous; it may be the squared distances'
  // memory.
  m.def("matern52_out(Tensor squared_distances, float scale, Tensor(a!) out) -> ()");
  // The same of some rows and columns of a matrix, int64, as a new one.
  m.def(
      "matern52_among(Tensor squared_distances, Tensor rows, Tensor columns, float scale) -> "
      "Tensor");
  // Squared distances [n, n] of rows [n, L], symmetric, 0 where they are at most `nothing` times
  // 1 + the two rows' `squares` [n].
  m.def("squared_distances(Tensor rows, Tensor squares, float nothing) -> Tensor");
  // Inner products [n, n] of rows [n, L], symmetric.
  m.def("inner_products(Tensor rows) -> Tensor");
  // Losses, float64 [K, n], of results [C, n] that are estimated each from all others, by
  // regressions on squared distances [n, n] with scales [K], sqrt(5) / length. They are infinite if
  // a covariance plus the nugget is not positive. On the CPU only.
  m.def(
      "left_out_losses(Tensor squared_distances, Tensor scales, Tensor results, float nugget) -> "
      "Tensor");
  // The instruction sets of this machine that have kernels, space-separated, best first.
  m.def("cpu_capabilities() -> str");
  // Private, for tests and benchmarks: from now on, every operator of this process uses the kernels
  // of one of them.
  m.def("_use_cpu_capability(str capability) -> ()");
}
