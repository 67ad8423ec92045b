// squared_distances and inner_products on CUDA: check, allocate, launch. The kernel's body is in
// distances_block.h.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../distances_checks.h"
#include "distances_block.h"
#include "runtime.h"

namespace coded_torch {

template <Pairs kPairs, class T, int kWidth>
__global__ void __launch_bounds__(kDistancesThreads)
    distances_kernel(DistancesArgs args, T nothing) {
  distances_thread<kPairs, T, kWidth>(args, nothing,
                                      int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
}

template <Pairs kPairs, class T, int kWidth>
static void launch(const DistancesArgs& args, int device_index) {
  // The x dimension of a grid holds 2^31 - 1 blocks.
  constexpr int64_t kMost = ((int64_t{1} << 31) - 1) * kDistancesThreads;
  const int64_t tiles = distances_tiles(args);
  STD_TORCH_CHECK(tiles <= kMost,
                  "squared_distances, inner_products: too many rows for a grid, got ",
                  args.num_rows);
  const auto blocks = static_cast<unsigned>((tiles + kDistancesThreads - 1) / kDistancesThreads);
  distances_kernel<kPairs, T, kWidth>
      <<<blocks, kDistancesThreads, 0, current_stream(device_index)>>>(
          args, static_cast<T>(args.nothing));
  check_launch();
}

template <Pairs kPairs, class T>
static void launch(const DistancesArgs& args, int device_index) {
  fits_wide<T>(args) ? launch<kPairs, T, kDistancesWidth<T>>(args, device_index)
                     : launch<kPairs, T, 1>(args, device_index);
}

template <Pairs kPairs>
static Tensor run(const DistancesCall& call, int device_index) {
  if (call.args.num_rows == 0) return call.out;
  call.out.scalar_type() == ScalarType::Double ? launch<kPairs, double>(call.args, device_index)
                                               : launch<kPairs, float>(call.args, device_index);
  return call.out;
}

Tensor squared_distances_cuda(const Tensor& rows, const Tensor& squares, double nothing) {
  const int device_index = rows.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  return run<Pairs::kDistances>(prepare_distances(rows, squares, nothing), device_index);
}

Tensor inner_products_cuda(const Tensor& rows) {
  const int device_index = rows.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  return run<Pairs::kProducts>(prepare_products("inner_products", rows), device_index);
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CUDA, m) {
  m.impl("squared_distances", TORCH_BOX(&squared_distances_cuda));
  m.impl("inner_products", TORCH_BOX(&inner_products_cuda));
}

}  // namespace coded_torch
