// The two 16-bit formats as storage: float in, float out, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "pack.h"

namespace coded_torch {

struct float16 {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

CODED_TORCH_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

CODED_TORCH_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Branch-free on the host, so that loops over rows become vector instructions.
CODED_TORCH_HD float to_float(bfloat16 value) {
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}

CODED_TORCH_HD float to_float(float16 value) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  // The exponent, biased by 15, read as one biased by 127: off by 2^112, subnormals included.
  const uint32_t scaled = float_bits(bits_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0u;
  return bits_float(sign | scaled | special);
#endif
}

CODED_TORCH_HD void from_float(float value, bfloat16* out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // the first with the instruction
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded);
#endif
}

CODED_TORCH_HD void from_float(float value, float16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Normal: move the exponent's bias from 127 to 15 and round the 13 lost bits to nearest even.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal: adding 1/2 leaves the value in units of 2^-24 in the low bits, rounded by the adder.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  uint32_t out_bits = magnitude < (113u << 23) ? subnormal : normal;
  out_bits = magnitude >= 0x477ff000 ? 0x7c00 : out_bits;  // 65520 and above round to infinity
  out_bits = magnitude > 0x7f800000 ? 0x7e00 : out_bits;
  out->bits = static_cast<uint16_t>(sign | out_bits);
#endif
}

CODED_TORCH_HD float to_float(float value) { return value; }
CODED_TORCH_HD double to_float(double value) { return value; }
CODED_TORCH_HD void from_float(float value, float* out) { *out = value; }
CODED_TORCH_HD void from_float(double value, double* out) { *out = value; }

// Maps are computed in float64 for float64 and in float32 for everything else.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

}  // namespace coded_torch
