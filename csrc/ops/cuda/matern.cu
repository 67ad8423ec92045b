// matern52_out on CUDA: check, launch. The kernel's body is in matern_block.h.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../matern_checks.h"
#include "matern_block.h"
#include "stream.h"

namespace coded_torch {

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaternThreads) matern_kernel(MaternArgs args, T scale) {
  matern_thread<T, kWidth>(args, scale, int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
}

template <class T, int kWidth>
static void launch(const MaternArgs& args, int device_index) {
  constexpr int64_t kPerBlock = int64_t{kMaternThreads} * kWidth;
  // The x dimension of a grid holds 2^31 - 1 blocks.
  constexpr int64_t kMost = ((int64_t{1} << 31) - 1) * kPerBlock;
  STD_TORCH_CHECK(args.count <= kMost, "matern52_out: at most ", kMost,
                  " squared distances fit a grid, got ", args.count);
  const auto blocks = static_cast<unsigned>((args.count + kPerBlock - 1) / kPerBlock);
  matern_kernel<T, kWidth><<<blocks, kMaternThreads, 0, current_stream(device_index)>>>(
      args, static_cast<T>(args.scale));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
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

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CUDA, m) {
  m.impl("matern52_out", TORCH_BOX(&matern52_out_cuda));
}

}  // namespace coded_torch
