// Runs the CUDA kernel of squared_distances over a whole grid on the host, as spline_grid.cpp does
// those of the splines.
#include <cstring>
#include <exception>

#include "../../csrc/ops/cuda/distances_block.h"

using namespace coded_torch;

#ifdef CODED_TORCH_PTX
#include "ptx.h"

namespace coded_torch {
// As declared in distances.cu, so that its names are those of the translated kernels.
template <class T, int kWidth>
void distances_kernel(DistancesArgs args, T nothing);
}  // namespace coded_torch

template <class T, int kWidth>
static void run_thread(const DistancesArgs& args, int64_t block, int thread) {
  ptx::thread = {static_cast<uint32_t>(thread), static_cast<uint32_t>(block), kDistancesThreads};
  distances_kernel<T, kWidth>(args, static_cast<T>(args.nothing));
}
#else
template <class T, int kWidth>
static void run_thread(const DistancesArgs& args, int64_t block, int thread) {
  distances_thread<T, kWidth>(args, static_cast<T>(args.nothing),
                              block * kDistancesThreads + thread);
}
#endif

template <class T, int kWidth>
static void run(const DistancesArgs& args) {
  const int64_t tiles = distances_tiles(args);
  for (int64_t block = 0; block * kDistancesThreads < tiles; ++block) {
    for (int thread = 0; thread < kDistancesThreads; ++thread) {
      run_thread<T, kWidth>(args, block, thread);
    }
  }
}

template <class T>
static void run(const DistancesArgs& args) {
  fits_wide<T>(args) ? run<T, kDistancesWidth<T>>(args) : run<T, 1>(args);
}

// `failure` receives what went wrong, if anything.
extern "C" void coded_torch_run_distances(const void* rows, const void* squares, void* out,
                                          int64_t num_rows, int64_t num_columns, double nothing,
                                          bool wide, char failure[80]) {
  const DistancesArgs args{rows, num_columns, squares, out, num_rows, num_columns, nothing};
  try {
    wide ? run<double>(args) : run<float>(args);
  } catch (const std::exception& error) {
    std::strncpy(failure, error.what(), 79);
  }
}
