// matern52_out and matern52_among on CUDA: check, launch. The kernels' bodies are in
// matern_block.h.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../matern_checks.h"
#include "matern_block.h"
#include "runtime.h"

namespace coded_torch {

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaternThreads) matern_kernel(MaternArgs args, T scale) {
  matern_thread<T, kWidth>(args, scale, int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kMaternThreads)
    matern_among_kernel(MaternAmongArgs args, T scale) {
  matern_among_thread<T>(args, scale, int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
}

// As many as have so many numbers to do, each `per_block`.
static unsigned blocks_of(const char* op, int64_t count, int64_t per_block) {
  // The x dimension of a grid holds 2^31 - 1 blocks.
  const int64_t most = ((int64_t{1} << 31) - 1) * per_block;
  STD_TORCH_CHECK(count <= most, op, ": at most ", most, " squared distances fit a grid, got ",
                  count);
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

template <class T, int kWidth>
static void launch(const MaternArgs& args, int device_index) {
  const unsigned blocks = blocks_of("matern52_out", args.count, int64_t{kMaternThreads} * kWidth);
  matern_kernel<T, kWidth><<<blocks, kMaternThreads, 0, current_stream(device_index)>>>(
      args, static_cast<T>(args.scale));
  check_launch();
}

template <class T>
static void launch(const MaternArgs& args, int device_index) {
  fits_wide<T>(args) ? launch<T, kMaternWidth<T>>(args, device_index)
                     : launch<T, 1>(args, device_index);
}

void matern52_out_cuda(const Tensor& squared, double scale, const Tensor& out) {
  const int device_index = squared.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const MaternArgs args = matern_args(squared, scale, out);
  if (args.count == 0) return;
  squared.scalar_type() == ScalarType::Double ? launch<double>(args, device_index)
                                              : launch<float>(args, device_index);
}

template <class T>
static void launch(const MaternAmongArgs& args, int device_index) {
  const unsigned blocks =
      blocks_of("matern52_among", args.num_rows * args.num_columns, kMaternThreads);
  matern_among_kernel<T><<<blocks, kMaternThreads, 0, current_stream(device_index)>>>(
      args, static_cast<T>(args.scale));
  check_launch();
}

Tensor matern52_among_cuda(const Tensor& squared, const Tensor& rows, const Tensor& columns,
                           double scale) {
  const int device_index = squared.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const MaternAmongCall call = prepare_among(squared, rows, columns, scale);
  if (call.out.numel() == 0) return call.out;
  squared.scalar_type() == ScalarType::Double ? launch<double>(call.args, device_index)
                                              : launch<float>(call.args, device_index);
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CUDA, m) {
  m.impl("matern52_among", TORCH_BOX(&matern52_among_cuda));
  m.impl("matern52_out", TORCH_BOX(&matern52_out_cuda));
}

}  // namespace coded_torch
