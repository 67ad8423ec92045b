// Runs the CUDA kernel of matern52_out over a whole grid on the host, as spline_grid.cpp does those
// of the splines.
#include <cstring>
#include <exception>

#include "../../csrc/ops/cuda/matern_block.h"

using namespace coded_torch;

static int64_t blocks_of(int64_t count, int64_t per_block) {
  return (count + per_block - 1) / per_block;
}

#ifdef CODED_TORCH_PTX
#include "ptx.h"

namespace coded_torch {
// As declared in matern.cu, so that its names are those of the translated kernels.
template <class T, int kWidth>
void matern_kernel(MaternArgs args, T scale);
template <class T>
void matern_among_kernel(MaternAmongArgs args, T scale);
}  // namespace coded_torch

template <class T, int kWidth>
static void run(const MaternArgs& args, int64_t blocks) {
  ptx::run_grid(&matern_kernel<T, kWidth>, blocks, kMaternThreads, 0, args,
                static_cast<T>(args.scale));
}

template <class T>
static void run(const MaternAmongArgs& args, int64_t blocks) {
  ptx::run_grid(&matern_among_kernel<T>, blocks, kMaternThreads, 0, args,
                static_cast<T>(args.scale));
}
#else
template <class T, int kWidth>
static void run(const MaternArgs& args, int64_t blocks) {
  for (int64_t thread = 0; thread < blocks * kMaternThreads; ++thread) {
    matern_thread<T, kWidth>(args, static_cast<T>(args.scale), thread);
  }
}

template <class T>
static void run(const MaternAmongArgs& args, int64_t blocks) {
  for (int64_t thread = 0; thread < blocks * kMaternThreads; ++thread) {
    matern_among_thread<T>(args, static_cast<T>(args.scale), thread);
  }
}
#endif

template <class T>
static void run_among(const MaternAmongArgs& args) {
  run<T>(args, blocks_of(args.num_rows * args.num_columns, kMaternThreads));
}

template <class T, int kWidth>
static void run(const MaternArgs& args) {
  run<T, kWidth>(args, blocks_of(args.count, int64_t{kMaternThreads} * kWidth));
}

template <class T>
static void run(const MaternArgs& args) {
  fits_wide<T>(args) ? run<T, kMaternWidth<T>>(args) : run<T, 1>(args);
}

// `failure` receives what went wrong, if anything.
extern "C" void coded_torch_run_matern(const void* squared, void* out, int64_t count, double scale,
                                       bool wide, char failure[80]) {
  const MaternArgs args{squared, out, count, scale};
  try {
    wide ? run<double>(args) : run<float>(args);
  } catch (const std::exception& error) {
    std::strncpy(failure, error.what(), 79);
  }
}

extern "C" void coded_torch_run_matern_among(const void* squared, int64_t stride,
                                             const int64_t* rows, const int64_t* columns, void* out,
                                             int64_t num_rows, int64_t num_columns, double scale,
                                             bool wide, char failure[80]) {
  const MaternAmongArgs args{squared, stride, rows, columns, out, num_rows, num_columns, scale};
  try {
    wide ? run_among<double>(args) : run_among<float>(args);
  } catch (const std::exception& error) {
    std::strncpy(failure, error.what(), 79);
  }
}
