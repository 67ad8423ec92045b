// squared_distances on CUDA: check, allocate, launch. The kernel's body is in distances_block.h.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../distances_checks.h"
#include "distances_block.h"
#include "stream.h"

namespace coded_torch {

template <class T, int kWidth>
__global__ void __launch_bounds__(kDistancesThreads)
    distances_kernel(DistancesArgs args, T nothing) {
  distances_thread<T, kWidth>(args, nothing, int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
}

template <class T, int kWidth>
static void launch(const DistancesArgs& args, int device_index) {
  // The x dimension of a grid holds 2^31 - 1 blocks.
  constexpr int64_t kMost = ((int64_t{1} << 31) - 1) * kDistancesThreads;
  const int64_t tiles = distances_tiles(args);
  STD_TORCH_CHECK(tiles <= kMost, "squared_distances: too many rows for a grid, got ",
                  args.num_rows);
  const auto blocks = static_cast<unsigned>((tiles + kDistancesThreads - 1) / kDistancesThreads);
  distances_kernel<T, kWidth><<<blocks, kDistancesThreads, 0, current_stream(device_index)>>>(
      args, static_cast<T>(args.nothing));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
static void launch(const DistancesArgs& args, int device_index) {
  fits_wide<T>(args) ? launch<T, kDistancesWidth<T>>(args, device_index)
                     : launch<T, 1>(args, device_index);
}

Tensor squared_distances_cuda(const Tensor& rows, const Tensor& squares, double nothing) {
  const int device_index = rows.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const DistancesCall call = prepare_distances(rows, squares, nothing);
  if (call.args.num_rows == 0) return call.out;
  rows.scalar_type() == ScalarType::Double ? launch<double>(call.args, device_index)
                                           : launch<float>(call.args, device_index);
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CUDA, m) {
  m.impl("squared_distances", TORCH_BOX(&squared_distances_cuda));
}

}  // namespace coded_torch
