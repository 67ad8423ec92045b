// Runs the CUDA kernels of squared_distances and inner_products over a whole grid on the host, as
// spline_grid.cpp does those of the splines.
#include <cstring>
#include <exception>
#include <limits>
#include <vector>

#include "../../csrc/ops/cuda/distances_block.h"
#include "block.h"

using namespace coded_torch;

#ifdef CODED_TORCH_PTX
#include "ptx.h"

namespace coded_torch {
// As declared in distances.cu, so that its names are those of the translated kernels.
template <Pairs kPairs, class T>
void pairs_kernel(DistancesArgs args, PairsGrid grid, T* partial);
template <Pairs kPairs, class T>
void add_slices_kernel(DistancesArgs args, PairsGrid grid, const T* partial);
}  // namespace coded_torch

template <Pairs kPairs, class T>
static void run_pairs(const DistancesArgs& args, const PairsGrid& grid, T* partial) {
  ptx::run_grid(&pairs_kernel<kPairs, T>, grid.blocks, kPairsThreads, kPairsShared<T>, args, grid,
                partial);
}

template <Pairs kPairs, class T>
static void add_slices(const DistancesArgs& args, const PairsGrid& grid, const T* partial) {
  ptx::run_grid(&add_slices_kernel<kPairs, T>, grid.tiles * kPairsInTile / kPairsThreads,
                kPairsThreads, 0, args, grid, partial);
}
#else
template <Pairs kPairs, class T>
static void run_pairs(const DistancesArgs& args, const PairsGrid& grid, T* partial) {
  std::vector<char> shared(kPairsShared<T>);
  for (int64_t i = 0; i < grid.blocks; ++i) {
    std::memset(shared.data(), 0xff, shared.size());
    block::run_threads(kPairsThreads, [&](uint32_t thread) {
      pairs_thread<kPairs, T>(args, grid, i, static_cast<int>(thread), shared.data(), partial,
                              [] { block::barrier(0); });
    });
  }
}

template <Pairs kPairs, class T>
static void add_slices(const DistancesArgs& args, const PairsGrid& grid, const T* partial) {
  for (int64_t thread = 0; thread < grid.tiles * kPairsInTile; ++thread) {
    add_slices_thread<kPairs, T>(args, grid, partial, thread);
  }
}
#endif

template <Pairs kPairs, class T>
static void run(const DistancesArgs& args, int multiprocessors) {
  const PairsGrid grid = plan_pairs(args, multiprocessors);
  std::vector<T> partial(grid.parts > 1 ? grid.blocks * kPairsInTile : 0,
                         std::numeric_limits<T>::quiet_NaN());
  run_pairs<kPairs, T>(args, grid, partial.data());
  if (grid.parts > 1) add_slices<kPairs, T>(args, grid, partial.data());
}

template <Pairs kPairs>
static void run(const DistancesArgs& args, bool wide, int multiprocessors) {
  wide ? run<kPairs, double>(args, multiprocessors) : run<kPairs, float>(args, multiprocessors);
}

// Distances with `squares`, else products. `failure` receives what went wrong, if anything.
extern "C" void coded_torch_run_distances(const void* rows, const void* squares, void* out,
                                          int64_t num_rows, int64_t num_columns, double nothing,
                                          bool wide, int multiprocessors, char failure[80]) {
  const DistancesArgs args{rows, num_columns, squares, out, num_rows, num_columns, nothing};
  try {
    squares ? run<Pairs::kDistances>(args, wide, multiprocessors)
            : run<Pairs::kProducts>(args, wide, multiprocessors);
  } catch (const std::exception& error) {
    std::strncpy(failure, error.what(), 79);
  }
}
