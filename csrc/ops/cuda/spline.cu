// What NVRTC compiles behind the headers of kernels: one kernel, which macros name and choose.
// Another compiler sees nothing.
#if defined(__CUDACC_RTC__)

using namespace coded_torch;

constexpr bool kSweeps = Kind::KIND == Kind::kSweep || Kind::KIND == Kind::kWorkspaceSweep;
constexpr int kThreads = kSweeps ? kMaxThreads : kDenseWarps * kWarp;

extern "C" __global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    KERNEL(SplineArgs args, Grid grid, void* workspace) {
  extern __shared__ __align__(16) char shared[];
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kSweeps) {
    spline_thread<TYPE, TRANSPOSE, Kind::KIND>(args, grid, blockIdx.x, thread, shared, workspace);
  } else {
    constexpr int kWidth = Kind::KIND == Kind::kWideProduct ? kDenseWidth<TYPE> : 1;
    dense_thread<TYPE, kWidth>(args, grid, TRANSPOSE, blockIdx.x, thread, shared, BlockBarrier{});
  }
}
#endif
