// What the search for a regression, the regression and its error bounds share.
#pragma once

#include <numeric>
#include <tuple>

#include "distances.h"

namespace coded_torch {

constexpr double kLeastPrecision = 1e-12;  // a single result has 0

// If there are more results, evenly spaced ones are left out: all of 3,400 take .5 s. It is also
// the number up to which the inverse of the factor is known. (benchmarks accuracy)
constexpr int64_t kAllLeftOut = 512, kLeftOut = 256;

inline double scale_of(double length) { return std::sqrt(5.0) / std::max(length, 1e-30); }

inline void check_results(const char* op, const Tensor& results, int64_t count) {
  STD_TORCH_CHECK(results.scalar_type() == ScalarType::Double && results.dim() == 2 &&
                      results.is_contiguous() && results.is_cpu() && results.size(0) == count,
                  op, ": results must be float64, contiguous, [", count, ", C], on the CPU, got ",
                  torch::headeronly::toString(results.scalar_type()), " ", shape_str(results));
}

// Results [n, C] less their mean, [C, n], and of size 1 at most.
template <class T>
struct Scaled {
  Scaled(const Tensor& results, int64_t n, int64_t columns)
      : mean(columns),
        y(new_tensor({columns, n}, is_float() ? ScalarType::Float : ScalarType::Double)) {
    const double* from = numbers<double>(results);
    for (int64_t i = 0; i < n; ++i) {  // equal results become 0, however large
      for (int64_t c = 0; c < columns; ++c) {
        mean[c] += (from[i * columns + c] - from[c]) / static_cast<double>(n);
      }
    }
    for (int64_t c = 0; c < columns; ++c) mean[c] += from[c];
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        largest = std::max(largest, std::fabs(off(from, i, c, columns)));
      }
    }
    size = largest > 0 ? largest : 1;
    T* to = numbers<T>(y);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        to[c * n + i] = static_cast<T>(off(from, i, c, columns) / size);
      }
    }
  }

  static constexpr bool is_float() { return sizeof(T) == sizeof(float); }
  double off(const double* from, int64_t i, int64_t c, int64_t columns) const {
    return from[i * columns + c] - mean[c];
  }

  std::vector<double> mean;
  double largest = 0, size = 1;
  Tensor y;
};

// A regression, as its tensors cross to Python and back.
enum Field {
  kFactor,            // [M, M], the inverse of the factor, or what factorise leaves
  kOfLeftOut,         // rows of L^-T, [n, M]; none if the inverse is known
  kMean,              // C^-1 1, [M]
  kPrecision,         // 1' C^-1 1, float64, [1]
  kHalf,              // covariances of the missing rows times L^-T, [L, M]
  kLeft,              // weights of the mean, float64, [L]
  kVariances,         // of estimates, float64, [L]
  kLeftOutVariances,  // of the results that are left out, float64, [n]
  kWeights,           // of the results that are left out in estimates, float64, [L, n]
  kNumFields,
};
using Regression = std::vector<Tensor>;

// estimate.cpp
Regression regress_cpu(const Tensor& squared, double length, const Tensor& known,
                       const Tensor& missing, double nugget);

inline void check_process(const char* op, const Regression& process) {
  STD_TORCH_CHECK(process.size() == kNumFields, op, ": regression must be one of regress");
}

}  // namespace coded_torch
