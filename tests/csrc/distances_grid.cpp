// Runs the CUDA kernels of squared_distances and inner_products over a whole grid on the host, as
// spline_grid.cpp does those of the splines.
#include <cstring>
#include <exception>

#include "../../csrc/ops/cuda/distances_block.h"

using namespace coded_torch;

#ifdef CODED_TORCH_PTX
#include "ptx.h"

namespace coded_torch {
// As declared in distances.cu, so that its names are those of the translated kernels.
template <Pairs kPairs, class T, int kWidth>
void distances_kernel(DistancesArgs args, T nothing);
}  // namespace coded_torch

template <Pairs kPairs, class T, int kWidth>
static void run(const DistancesArgs& args) {
  ptx::run_grid(&distances_kernel<kPairs, T, kWidth>,
                (distances_tiles(args) + kDistancesThreads - 1) / kDistancesThreads,
                kDistancesThreads, 0, args, static_cast<T>(args.nothing));
}
#else
template <Pairs kPairs, class T, int kWidth>
static void run(const DistancesArgs& args) {
  for (int64_t thread = 0; thread < distances_tiles(args); ++thread) {
    distances_thread<kPairs, T, kWidth>(args, static_cast<T>(args.nothing), thread);
  }
}
#endif

template <Pairs kPairs, class T>
static void run(const DistancesArgs& args) {
  fits_wide<T>(args) ? run<kPairs, T, kDistancesWidth<T>>(args) : run<kPairs, T, 1>(args);
}

template <Pairs kPairs>
static void run(const DistancesArgs& args, bool wide) {
  wide ? run<kPairs, double>(args) : run<kPairs, float>(args);
}

// Distances with `squares`, else products. `failure` receives what went wrong, if anything.
extern "C" void coded_torch_run_distances(const void* rows, const void* squares, void* out,
                                          int64_t num_rows, int64_t num_columns, double nothing,
                                          bool wide, char failure[80]) {
  const DistancesArgs args{rows, num_columns, squares, out, num_rows, num_columns, nothing};
  try {
    squares ? run<Pairs::kDistances>(args, wide) : run<Pairs::kProducts>(args, wide);
  } catch (const std::exception& error) {
    std::strncpy(failure, error.what(), 79);
  }
}
