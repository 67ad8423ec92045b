// Every operator's schema, nothing else.
#include <torch/csrc/stable/library.h>

#include <string>

STABLE_TORCH_LIBRARY(coded_torch, m) {
  // values [n, G, m] -> [N, G, m], or [N, G, m] -> [n, G, m] where `transpose`.
  // coefficients [P, 12 n + 4 N], schedule [P, n + 1 + N]: csrc/math/spline_layout.h; P is 1 or G.
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
  // Of inputs, rows [n, d] and pooled [n, 2 D], or [0, 0] without: for each metric, given by the
  // kind of its features (0 rows, 1 by their spread, 2 pooled), its shrinkage and the rows that it
  // needs for each feature, coordinates [n, L] and a map [2, f] from inputs to features, both empty
  // if it does not apply; then their mean squared lengths.
  m.def(
      "fit_metrics(Tensor[] rows, Tensor[] pooled, Tensor? typical, int[] kinds, "
      "float[] shrinkages, int[] rows_each) -> Tensor[]");
  // Which rows of inputs, [n, d] each, are finite, and no longer than others by far: bool [n].
  m.def("typical_rows(Tensor[] rows) -> Tensor");
  // Squared distances [n, n] and lengths [n] of coordinates, the order of a path through them,
  // which is found if none is given, and its median step.
  m.def(
      "squared_distances(Tensor coordinates, float unit, Tensor? typical=None, Tensor? order=None) "
      "-> (Tensor, Tensor, Tensor, float)");
  // The metric, by its place, and the length by which results [F, C], of some rows, are estimated
  // best from each other. `standard` is the default metric, or -1.
  m.def(
      "choose_regression(Tensor[] coordinates, float[] units, Tensor? typical, Tensor order, "
      "Tensor some, Tensor results, int standard, float? length, float nugget) -> (int, float)");
  // A regression of missing rows on known ones of squared distances [P, P]: Field in
  // cpu/regression.h says what its tensors are.
  m.def(
      "regress(Tensor squared_distances, float length, Tensor known, Tensor missing, float nugget) "
      "-> Tensor[]");
  // The variance of each row estimated from at most so many that are near it on a path, [n].
  m.def(
      "path_variances(Tensor squared_distances, float length, Tensor order, int most, float "
      "nugget) "
      "-> Tensor");
  // Estimates [L, C] and residuals [n, C] of results [M, C], their error and trust; without results
  // the matrices [L, M] and [n, M] that make them.
  m.def(
      "estimate(Tensor[] regression, Tensor? results=None, float? trust=None) -> (Tensor, Tensor, "
      "float, float)");
  m.def("coefficients(Tensor[] regression, Tensor results) -> (Tensor, Tensor)");
  // Thresholds [1, L, n], or [2, L, n] where `is_signed`, by at most so many results, and how odd
  // these look, [n]: input_space/_gaussian_process.py.
  m.def(
      "error_thresholds(Tensor weights, Tensor variances, Tensor moved, Tensor known, float trust, "
      "int count, int calibrating, bool is_signed) -> (Tensor, Tensor)");
  // The same of answers [L, C], from residuals [n, C] of results [M, C]; and the p-values [L] of
  // labels, by scores [M, C] and [L, C]. Without a regression, answers are the mean.
  m.def(
      "error_bounds(Tensor[] regression, Tensor residuals, Tensor results, Tensor answers, "
      "Tensor? scores, Tensor? answered, float trust, int calibrating) -> (Tensor, Tensor, "
      "Tensor)");
  // The bounds [L] of thresholds [S, L, n], larger `by` [L], at one level.
  m.def("error_radii(Tensor thresholds, float level, Tensor? by=None) -> Tensor");
  // Of kernels on CUDA, private, for coded_torch/_extension.py and tests. `nvrtc` is the address of
  // a library; a number stands for a kernel (csrc/ops/cuda/grid.h). Python has the first three.
  m.def("_try_kernel(int device, int number) -> bool?");
  m.def("_fall_back(str why) -> bool");
  const std::string arguments =
      "(Tensor values, Tensor coefficients, Tensor schedule, bool transpose, Tensor? gather, "
      "Tensor? scatter, SymInt? num_rows";
  m.def(("_spline_by_torch" + arguments + ") -> Tensor").c_str());
  m.def(("_run_kernel" + arguments + ", int number) -> Tensor").c_str());
  m.def("_load_kernel(int device, int number, int nvrtc, str machine) -> bool");
  m.def("_end_trial() -> ()");
  m.def("_compile_kernel(str architecture, int number, int nvrtc) -> Tensor");
  m.def("_kernel_name(int number) -> str");
  m.def("_kernel_attribute(int device, int number, int attribute) -> int");
  m.def("_relax() -> ()");
  m.def("_keep(str key, str text) -> str");
  m.def("_launches(int device, int number) -> int");
  // The instruction sets of this machine that have kernels, space-separated, best first.
  m.def("cpu_capabilities() -> str");
  // Private, for tests and benchmarks: from now on, every operator of this process uses the kernels
  // of one of them.
  m.def("_use_cpu_capability(str capability) -> ()");
}
