// squared_distances and inner_products on CUDA: check, allocate, launch. The kernels' bodies are in
// distances_block.h.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../distances_checks.h"
#include "distances_block.h"
#include "runtime.h"

namespace coded_torch {

template <Pairs kPairs, class T>
__global__ void __launch_bounds__(kPairsThreads, 2)
    pairs_kernel(DistancesArgs args, PairsGrid grid, T* partial) {
  extern __shared__ __align__(16) char shared[];
  pairs_thread<kPairs, T>(args, grid, blockIdx.x, static_cast<int>(threadIdx.x), shared, partial,
                          BlockBarrier{});
}

template <Pairs kPairs, class T>
__global__ void __launch_bounds__(kPairsThreads)
    add_slices_kernel(DistancesArgs args, PairsGrid grid, const T* partial) {
  add_slices_thread<kPairs, T>(args, grid, partial, int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
}

template <Pairs kPairs, class T>
static Tensor launch(const DistancesCall& call, int device_index) {
  const PairsGrid grid = plan_pairs(call.args, multiprocessors_of(device_index));
  STD_TORCH_CHECK(grid.blocks <= kMaxBlocks,
                  "squared_distances, inner_products: too many rows for a grid, got ",
                  call.args.num_rows);
  const cudaStream_t stream = current_stream(device_index);
  // Owned by the allocator of the current stream: the next owner's work comes after these kernels.
  std::optional<Tensor> sums;
  T* partial = nullptr;
  if (grid.parts > 1) {
    sums = torch::stable::empty({grid.blocks, kPairsInTile}, call.out.scalar_type(), std::nullopt,
                                call.out.device());
    partial = static_cast<T*>(sums->mutable_data_ptr());
  }
  pairs_kernel<kPairs, T>
      <<<static_cast<unsigned>(grid.blocks), kPairsThreads, kPairsShared<T>, stream>>>(
          call.args, grid, partial);
  check_launch();
  if (grid.parts > 1) {
    const auto blocks = static_cast<unsigned>(grid.tiles * kPairsInTile / kPairsThreads);
    add_slices_kernel<kPairs, T><<<blocks, kPairsThreads, 0, stream>>>(call.args, grid, partial);
    check_launch();
  }
  return call.out;
}

template <Pairs kPairs>
static Tensor run(const DistancesCall& call, int device_index) {
  if (call.args.num_rows == 0) return call.out;
  return call.out.scalar_type() == ScalarType::Double ? launch<kPairs, double>(call, device_index)
                                                      : launch<kPairs, float>(call, device_index);
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
