// Runs the CUDA kernel of matern52_out over a whole grid on the host, as spline_grid.cpp does those
// of the splines.
#include <cstring>
#include <exception>

#include "../../csrc/ops/cuda/matern_block.h"

using namespace coded_torch;

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
static void run_thread(const MaternArgs& args, int64_t block, int thread) {
  ptx::thread = {static_cast<uint32_t>(thread), static_cast<uint32_t>(block), kMaternThreads};
  matern_kernel<T, kWidth>(args, static_cast<T>(args.scale));
}

template <class T>
static void run_thread(const MaternAmongArgs& args, int64_t block, int thread) {
  ptx::thread = {static_cast<uint32_t>(thread), static_cast<uint32_t>(block), kMaternThreads};
  matern_among_kernel<T>(args, static_cast<T>(args.scale));
}
#else
template <class T, int kWidth>
static void run_thread(const MaternArgs& args, int64_t block, int thread) {
  matern_thread<T, kWidth>(args, static_cast<T>(args.scale), block * kMaternThreads + thread);
}

template <class T>
static void run_thread(const MaternAmongArgs& args, int64_t block, int thread) {
  matern_among_thread<T>(args, static_cast<T>(args.scale), block * kMaternThreads + thread);
}
#endif

template <class T>
static void run_among(const MaternAmongArgs& args) {
  const int64_t count = args.num_rows * args.num_columns;
  for (int64_t block = 0; block * kMaternThreads < count; ++block) {
    for (int thread = 0; thread < kMaternThreads; ++thread) run_thread<T>(args, block, thread);
  }
}

template <class T, int kWidth>
static void run(const MaternArgs& args) {
  constexpr int64_t kPerBlock = int64_t{kMaternThreads} * kWidth;
  for (int64_t block = 0; block < (args.count + kPerBlock - 1) / kPerBlock; ++block) {
    for (int thread = 0; thread < kMaternThreads; ++thread)
      run_thread<T, kWidth>(args, block, thread);
  }
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
