// Distances between rows, steps of a path through them, and triangles: what the operators of
// metrics.cpp and estimate.cpp share.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "capabilities.h"
#include "products.h"

namespace coded_torch {

// Distances that so many roundings may cause are 0: a margin for sums of some thousand terms; it
// was not tuned.
constexpr double kRoundings = 128;
// The least step, in root mean squares of the rows' lengths: noisy copies of a few pictures would
// have so short a length that rounding decides. It was not tuned.
constexpr double kShortest = 0.01;
constexpr int64_t kLineFloats = 16;  // of 64 bytes, the widest vector

inline const EstimateKernels& kernels() { return *chosen_capability().load()->estimate; }

inline int64_t padded(int64_t count) {
  return (count + kLineFloats - 1) / kLineFloats * kLineFloats;
}

using Floats = std::unique_ptr<float, decltype(&std::free)>;

// Memory aligned to 64 bytes, all zeros.
inline Floats new_floats(int64_t count) {
  const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
  Floats memory(static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
  STD_TORCH_CHECK(memory, "coded_torch: out of memory for ", bytes, " bytes");
  std::memset(memory.get(), 0, bytes);
  return memory;
}

// At most so many of 0 .. size - 1, evenly spaced.
inline std::vector<int64_t> evenly(int64_t size, int64_t most) {
  const int64_t count = std::min(size, most);
  std::vector<int64_t> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = i * size / count;
  return out;
}

inline void check_coordinates(const char* op, const Tensor& rows) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float && rows.dim() == 2 &&
                      rows.is_contiguous() && rows.is_cpu(),
                  op, ": coordinates must be float32, contiguous, [n, L], on the CPU, got ",
                  torch::headeronly::toString(rows.scalar_type()), " ", shape_str(rows));
}

inline void check_indices(const char* op, const Tensor& index, int64_t size) {
  STD_TORCH_CHECK(index.dim() == 1 && index.is_contiguous() && index.is_cpu() &&
                      index.scalar_type() == ScalarType::Long,
                  op, ": rows must be named by contiguous int64 vectors on the CPU, got ",
                  torch::headeronly::toString(index.scalar_type()), " ", shape_str(index));
  const int64_t* indices = numbers<int64_t>(index);
  for (int64_t i = 0; i < index.numel(); ++i) {
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < size, op, ": rows must lie in 0..", size - 1,
                    ", got ", indices[i]);
  }
}

inline const bool* mask_of(const char* op, const std::optional<Tensor>& typical, int64_t n) {
  if (!typical) return nullptr;
  STD_TORCH_CHECK(typical->scalar_type() == ScalarType::Bool && typical->dim() == 1 &&
                      typical->size(0) == n && typical->is_contiguous() && typical->is_cpu(),
                  op, ": typical must be bool, [", n, "], on the CPU, got ", shape_str(*typical));
  return numbers<bool>(*typical);
}

inline Tensor some_rows(const Tensor& rows, const std::vector<int64_t>& some) {
  const int64_t width = rows.size(1);
  const Tensor out = new_tensor({static_cast<int64_t>(some.size()), width}, ScalarType::Float);
  const float* from = numbers<float>(rows);
  float* to = numbers<float>(out);
  for (const int64_t row : some) to = std::copy_n(from + row * width, width, to);
  return out;
}

// The squared distance of two rows; 0 where rounding of rows of these squared lengths, of a mean
// square `unit`, may be all that there is.
inline float apart(const float* one, const float* other, int64_t width, float squares,
                   double unit) {
  constexpr double kNothing = kRoundings * std::numeric_limits<float>::epsilon();
  const float square = kernels().apart(one, other, width);
  return square <= (unit + squares) * kNothing * kNothing ? 0 : square;
}

// Squared distances [n, n] of coordinates [n, L], symmetric, infinite from rows that are not
// typical; fills `squares` with the squared lengths. They are made of inner products; of near rows
// of differences, as rounded products would part rows that repeat.
inline Tensor distances_of(const Tensor& rows, double unit, const bool* typical, float* squares) {
  const int64_t n = rows.size(0), width = rows.size(1);
  const Tensor out = inner_products(rows);
  float* distances = numbers<float>(out);
  const float* x = numbers<float>(rows);
  for (int64_t i = 0; i < n; ++i) squares[i] = distances[i * n + i];
  for_blocks(n, 32, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      float* row = distances + i * n;
      const bool is_near = kernels().distances(row, squares[i], squares, i);
      for (int64_t j = 0; is_near && j < i; ++j) {
        const float both = squares[i] + squares[j];
        if (row[j] < kNear * both) {
          row[j] = apart(x + i * width, x + j * width, width, both, unit);
        }
      }
      for (int64_t j = 0; typical && j < i; ++j) {
        if (!(typical[i] && typical[j])) row[j] = std::numeric_limits<float>::infinity();
      }
      row[i] = 0;
    }
  });
  mirror(distances, n);
  return out;
}

// The median distance between neighbours on a path; 1 if that says nothing.
inline double path_step(const Tensor& rows, const std::vector<int64_t>& path, const bool* typical,
                        double unit) {
  const int64_t width = rows.size(1);
  const float* x = numbers<float>(rows);
  const auto row = [&](int64_t i) { return x + i * width; };
  std::vector<float> steps;
  float before = 0, square = 0;
  for (size_t i = 0; i < path.size(); ++i, before = square) {
    const int64_t b = path[i], a = path[i ? i - 1 : 0];
    square = kernels().apart(row(b), nullptr, width);
    if (!i || (typical && !(typical[a] && typical[b]))) continue;
    const float both = before + square;
    const float step = apart(row(a), row(b), width, both, unit);
    if (step > 0 && step < std::numeric_limits<float>::infinity()) steps.push_back(step);
  }
  if (steps.empty()) return 1;
  const auto middle = steps.begin() + (steps.size() - 1) / 2;
  std::nth_element(steps.begin(), middle, steps.end());
  return std::max(std::sqrt(static_cast<double>(*middle)), kShortest * std::sqrt(unit));
}

// A square matrix as the kernel that inverts triangles wants it.
class Padded {
 public:
  explicit Padded(int64_t n)
      : n_(n), stride_(padded(n)), memory_(new_floats((n + 3) * stride_ + stride_)) {}

  float* row(int64_t i) { return memory_.get() + i * stride_; }

  // The inverse of the factor of the symmetric matrix, which it overwrites, [n, n], lower; none if
  // it is not positive.
  std::optional<Tensor> inverse_factor() {
    float* inverses = memory_.get() + (n_ + 3) * stride_;
    if (!kernels().invert(memory_.get(), n_, stride_, inverses)) return std::nullopt;
    const Tensor out = new_tensor({n_, n_}, ScalarType::Float);
    float* to = numbers<float>(out);
    for (int64_t i = 0; i < n_; ++i) {
      const float* from = row(i);
      const float scale = std::sqrt(inverses[i]);
      for (int64_t j = 0; j < n_; ++j) to[i * n_ + j] = scale * from[j];
    }
    return out;
  }

 private:
  int64_t n_, stride_;
  Floats memory_;
};

}  // namespace coded_torch
