// The Matern covariance of smoothness 5/2, of one squared distance or of a vector of them.
#pragma once

#include <cstdint>

#include "pack.h"

namespace coded_torch {

// What exp needs to know of a floating-point format.
template <class T>
struct ExpFormat;

template <>
struct ExpFormat<float> {
  using Bits = uint32_t;
  static constexpr int kFractionBits = 23, kBias = 127;
  static constexpr int kDegree = 7;   // of a series that is exact to rounding within ln(2) / 2
  static constexpr float kMost = 43;  // exp(-2 kMost) is a normal number
  // ln(2) in two parts, the first of so few bits that its multiples are exact.
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -2.12194440054690583e-4f;
};

template <>
struct ExpFormat<double> {
  using Bits = uint64_t;
  static constexpr int kFractionBits = 52, kBias = 1023;
  static constexpr int kDegree = 13;
  static constexpr double kMost = 350;
  static constexpr double kLn2High = 0x1.62e4p-1, kLn2Low = 1.42860682030941723212e-6;
};

// `Lanes` says what a number is, and what `Numbers` are: one, or a vector of them; how their bits
// are read, and their roots taken.

template <int k>
constexpr double kFactorial = k * kFactorial<k - 1>;
template <>
constexpr double kFactorial<0> = 1;

// The terms of exp(r) from the k-th on, over r^k, by Horner's rule.
template <class Lanes, int kTerm = 0>
CODED_TORCH_HD typename Lanes::Numbers exp_series(const typename Lanes::Numbers& r) {
  using T = typename Lanes::Number;
  constexpr T kCoefficient = static_cast<T>(1 / kFactorial<kTerm>);
  if constexpr (kTerm == ExpFormat<T>::kDegree) {
    return typename Lanes::Numbers{} + kCoefficient;
  } else {
    return kCoefficient + r * exp_series<Lanes, kTerm + 1>(r);
  }
}

// exp(-s) of s in 0 .. kMost; NaN of NaN.
template <class Lanes>
CODED_TORCH_HD typename Lanes::Numbers exp_minus(const typename Lanes::Numbers& s) {
  using T = typename Lanes::Number;
  using Format = ExpFormat<T>;
  using Bits = typename Format::Bits;
  // So large that a sum with it is a whole number, which its last bits hold.
  constexpr T kWhole = static_cast<T>(int64_t{3} << (Format::kFractionBits - 1));
  constexpr T kLog2E = static_cast<T>(1.44269504088896340736);
  const typename Lanes::Numbers shifted = kWhole - s * kLog2E;
  const typename Lanes::Numbers exponent = shifted - kWhole;
  const typename Lanes::Numbers r = -exponent * Format::kLn2High - s - exponent * Format::kLn2Low;
  const typename Lanes::Numbers power =
      Lanes::numbers((Lanes::bits(shifted) + Bits{Format::kBias}) << Format::kFractionBits);
  return power * exp_series<Lanes>(r);
}

// (1 + s + s^2 / 3) exp(-s) of s = scale * sqrt(squared), with scale = sqrt(5) / length; 0 where s
// is infinite, or so large that products of two would be subnormal. NaN of NaN.
template <class Lanes>
CODED_TORCH_HD typename Lanes::Numbers matern52(const typename Lanes::Numbers& squared,
                                                typename Lanes::Number scale) {
  using Numbers = typename Lanes::Numbers;
  using T = typename Lanes::Number;
  constexpr T kMost = ExpFormat<T>::kMost;
  constexpr T kThird = static_cast<T>(1.0 / 3);
  const Numbers most = Numbers{} + kMost;
  const Numbers s = scale * Lanes::sqrt(squared);
  const Numbers bounded = s > most ? most : s;
  const Numbers value = (T{1} + bounded * (T{1} + bounded * kThird)) * exp_minus<Lanes>(bounded);
  return s > most ? Numbers{} : value;
}

}  // namespace coded_torch
