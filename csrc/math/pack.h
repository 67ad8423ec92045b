// A few columns side by side: what one step of a sweep works on.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no header of the standard library
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
#endif

#if defined(__CUDACC__)
#define CODED_TORCH_HD __host__ __device__ __forceinline__
#define CODED_TORCH_UNROLL _Pragma("unroll")
#define CODED_TORCH_PRAGMA(text) _Pragma(#text)
#define CODED_TORCH_UNROLL_BY(times) CODED_TORCH_PRAGMA(unroll times)
#else
#define CODED_TORCH_HD inline __attribute__((always_inline))
#define CODED_TORCH_UNROLL _Pragma("GCC unroll 16")
#define CODED_TORCH_UNROLL_BY(times)
#endif

namespace coded_torch {

constexpr int pack_alignment(int lane_alignment, int bytes) {
  return bytes > 16 ? (lane_alignment > 16 ? lane_alignment : 16) : bytes;
}

// `Lane` is a scalar, or on the CPU a vector of the compiler's extension; `kSize` a power of two.
// Aligned for accesses of 16 bytes, the widest that a GPU has.
template <class Lane, int kSize>
struct alignas(pack_alignment(alignof(Lane), sizeof(Lane) * kSize)) Pack {
  Lane lane[kSize];

  CODED_TORCH_HD friend Pack operator+(const Pack& a, const Pack& b) {
    Pack out;
    CODED_TORCH_UNROLL
    for (int i = 0; i < kSize; ++i) out.lane[i] = a.lane[i] + b.lane[i];
    return out;
  }
  CODED_TORCH_HD friend Pack operator-(const Pack& a, const Pack& b) {
    Pack out;
    CODED_TORCH_UNROLL
    for (int i = 0; i < kSize; ++i) out.lane[i] = a.lane[i] - b.lane[i];
    return out;
  }
  template <class Scalar>
  CODED_TORCH_HD friend Pack operator*(Scalar a, const Pack& b) {
    Pack out;
    CODED_TORCH_UNROLL
    for (int i = 0; i < kSize; ++i) out.lane[i] = a * b.lane[i];
    return out;
  }
  CODED_TORCH_HD friend Pack operator*(const Pack& a, const Pack& b) {
    Pack out;
    CODED_TORCH_UNROLL
    for (int i = 0; i < kSize; ++i) out.lane[i] = a.lane[i] * b.lane[i];
    return out;
  }
  CODED_TORCH_HD static Pack zero() {
    Pack out;
    CODED_TORCH_UNROLL
    for (int i = 0; i < kSize; ++i) out.lane[i] = Lane{};
    return out;
  }
};

}  // namespace coded_torch
