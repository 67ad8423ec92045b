// A regression and its estimates of missing rows, on the CPU only. coded_torch/ops.py says what the
// operators return.
#include <torch/csrc/stable/library.h>

#include "regression.h"

namespace coded_torch {

// Standard errors that a gain over the mean must exceed. On outputs of noise, with 6 to 204
// results, the mean is estimated in 65 to 78 of 100 batches instead of 17 to 60. Where inputs
// explain little, and in residuals of students, the squared error stays within .2 %. A whole
// standard error costs up to 7 % there. (measured once; no benchmark keeps it)
constexpr double kTrustErrors = 0.5;

static bool knows_inverse(const Regression& process) { return !process[kOfLeftOut].size(0); }

static Tensor rows_times(const Tensor& rows, const Regression& process, bool back) {
  if (knows_inverse(process)) {
    return product(rows, back ? process[kFactor] : transposed(process[kFactor]));
  }
  const Tensor out = torch::stable::clone(rows);
  solve(out, process[kFactor], back);
  return out;
}

// Rows times L^-T; and rows times L^-T times L^-1, which is C^-1.
static Tensor half_of(const Tensor& rows, const Regression& process) {
  return rows_times(rows, process, false);
}
static Tensor whole_of(const Tensor& half, const Regression& process) {
  return rows_times(half, process, true);
}

template <class A, class B>
static double inner(const A* a, const B* b, int64_t count) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t k = 0; k < 4; ++k) sums[k] += static_cast<double>(a[i + k]) * b[i + k];
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(a[i]) * b[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T>
static constexpr ScalarType kType =
    sizeof(T) == sizeof(float) ? ScalarType::Float : ScalarType::Double;

// Squared distances of a batch, and the rows among which there are results.
namespace {

struct Problem {
  const Tensor& squared;
  const int64_t* known;
  int64_t count;
  double scale;

  template <class T>
  void covariances(int64_t row, int64_t first, T* out) const {
    const T* from = numbers<T>(squared) + row * squared.size(1);
    const MaternArgs args{from, out, count - first, scale};
    chosen_capability().load()->matern->run_among[sizeof(T) == sizeof(float)](args, known + first);
  }
};

}  // namespace

// The factor of the covariance plus the nugget, or its inverse; false if there is none.
template <class T>
static bool factor(const Problem& problem, double nugget, Regression& process) {
  const int64_t n = problem.count;
  const bool all = n <= kAllLeftOut;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (all) {
      Padded matrix(n);
      for_blocks(n, 64, [&](int64_t first, int64_t count) {
        for (int64_t i = first; i < first + count; ++i) {
          problem.covariances<T>(problem.known[i], i, matrix.row(i) + i);
          matrix.row(i)[i] += static_cast<float>(nugget);
        }
      });
      const std::optional<Tensor> inverse = matrix.inverse_factor();
      if (inverse) process[kFactor] = *inverse;
      return inverse.has_value();
    }
  }
  const Tensor matrix = new_tensor({n, n}, kType<T>);
  for_blocks(n, 64, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      T* row = numbers<T>(matrix) + i * n;
      problem.covariances<T>(problem.known[i], 0, row);
      row[i] += static_cast<T>(nugget);
    }
  });
  if (!factorise(matrix)) return false;
  const std::vector<int64_t> left_out = evenly(n, all ? n : kLeftOut);
  const Tensor unit = new_tensor({static_cast<int64_t>(left_out.size()), n}, kType<T>);
  std::fill_n(numbers<T>(unit), unit.numel(), T{0});
  for (size_t i = 0; i < left_out.size(); ++i) numbers<T>(unit)[i * n + left_out[i]] = 1;
  solve(unit, matrix, all);
  process[kFactor] = all ? unit : matrix;
  if (!all) process[kOfLeftOut] = unit;
  return true;
}

template <class T>
static void fill(const Problem& problem, const int64_t* missing, double nugget,
                 Regression& process) {
  const int64_t n = problem.count, num_missing = process[kLeft].numel();
  const bool all = knows_inverse(process);
  const Tensor mean = new_tensor({n}, kType<T>);
  T* weights = numbers<T>(mean);
  std::vector<double> squares(all ? n : kLeftOut), sums(n);
  if (all) {
    for (int64_t i = 0; i < n; ++i) {
      const T* row = numbers<T>(process[kFactor]) + i * n;
      double sum = 0;
      for (int64_t j = 0; j <= i; ++j) sum += row[j];
      for (int64_t j = 0; j <= i; ++j) {
        sums[j] += sum * row[j];
        squares[j] += static_cast<double>(row[j]) * row[j];
      }
    }
    std::copy(sums.begin(), sums.end(), weights);
  } else {
    const Tensor ones = new_tensor({1, n}, kType<T>);
    std::fill_n(numbers<T>(ones), n, T{1});
    const Tensor solved = whole_of(half_of(ones, process), process);
    std::copy_n(numbers<T>(solved), n, weights);
    for (int64_t i = 0; i < kLeftOut; ++i) {
      const T* row = numbers<T>(process[kOfLeftOut]) + i * n;
      squares[i] = inner(row, row, n);
    }
  }
  process[kMean] = mean;
  const double precision = std::accumulate(weights, weights + n, 0.0);
  numbers<double>(process[kPrecision])[0] = precision;
  const std::vector<int64_t> left_out = evenly(n, static_cast<int64_t>(squares.size()));
  process[kLeftOutVariances] =
      new_tensor({static_cast<int64_t>(squares.size())}, ScalarType::Double);
  double* of_left_out = numbers<double>(process[kLeftOutVariances]);
  for (size_t i = 0; i < squares.size(); ++i) {
    const double weight = weights[left_out[i]];
    of_left_out[i] = 1 / std::max(squares[i] - weight * weight / precision, kLeastPrecision);
  }

  const Tensor covariances = new_tensor({num_missing, n}, kType<T>);
  for_blocks(num_missing, 16, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      problem.covariances<T>(missing[i], 0, numbers<T>(covariances) + i * n);
    }
  });
  process[kHalf] = half_of(covariances, process);
  double *left = numbers<double>(process[kLeft]), *variances = numbers<double>(process[kVariances]);
  const T *half = numbers<T>(process[kHalf]), *rows = numbers<T>(covariances);
  for (int64_t i = 0; i < num_missing; ++i) {
    left[i] = 1 - inner(rows + i * n, weights, n);
    const double explained = inner(half + i * n, half + i * n, n);
    variances[i] = std::max(1 + nugget - explained + left[i] * left[i] / precision, nugget);
  }
  const Tensor some =
      product(process[kHalf], all ? process[kFactor] : transposed(process[kOfLeftOut]));
  const int64_t width = some.size(1);
  process[kWeights] = new_tensor({num_missing, width}, ScalarType::Double);
  double* to = numbers<double>(process[kWeights]);
  const T* from = numbers<T>(some);
  for (int64_t i = 0; i < num_missing; ++i, to += width, from += width) {
    double sum = 0;
    for (int64_t j = 0; j < width; ++j) {
      to[j] = from[j] + left[i] / precision * weights[left_out[j]];
      sum += to[j];
    }
    for (int64_t j = 0; all && j < width; ++j) to[j] += (1 - sum) / width;  // after rounding
  }
}

Regression regress_cpu(const Tensor& squared, double length, const Tensor& known,
                       const Tensor& missing, double nugget) {
  const ScalarType dtype = squared.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Double || dtype == ScalarType::Float) &&
                      squared.dim() == 2 && squared.size(0) == squared.size(1) &&
                      squared.is_contiguous() && squared.is_cpu(),
                  "regress: squared must be float64 or float32, contiguous, [P, P], on the CPU, "
                  "got ",
                  torch::headeronly::toString(dtype), " ", shape_str(squared));
  check_indices("regress", known, squared.size(0));
  check_indices("regress", missing, squared.size(0));
  const int64_t n = known.numel(), num_missing = missing.numel();
  STD_TORCH_CHECK(n, "regress: known must name at least one row, got none");
  const Tensor none = new_tensor({0, 0}, ScalarType::Double);
  Regression process(kNumFields, none);
  process[kPrecision] = new_tensor({1}, ScalarType::Double);
  process[kLeft] = new_tensor({num_missing}, ScalarType::Double);
  process[kVariances] = new_tensor({num_missing}, ScalarType::Double);
  const int64_t* places = numbers<int64_t>(known);
  if (dtype == ScalarType::Float) {
    const Problem problem{squared, places, n, scale_of(length)};
    if (factor<float>(problem, nugget, process)) {
      fill<float>(problem, numbers<int64_t>(missing), nugget, process);
      return process;
    }
  }
  Tensor wide = squared;
  if (dtype == ScalarType::Float) {
    wide = new_tensor({squared.size(0), squared.size(1)}, ScalarType::Double);
    std::copy_n(numbers<float>(squared), squared.numel(), numbers<double>(wide));
  }
  const double* all = numbers<double>(wide);
  const bool is_nan = std::any_of(all, all + wide.numel(), [](double x) { return std::isnan(x); });
  STD_TORCH_CHECK(!is_nan, "regress: squared must be numbers, got NaN");
  const Problem problem{wide, places, n, scale_of(length)};
  // With a nugget of n at the latest, the diagonal dominates, if covariances are numbers.
  while (!factor<double>(problem, nugget, process)) {
    STD_TORCH_CHECK(nugget > 0 && nugget <= 1e2 * static_cast<double>(n),
                    "regress: length and nugget must be positive numbers, got ", length);
    nugget *= 10;
  }
  fill<double>(problem, numbers<int64_t>(missing), nugget, process);
  return process;
}

// The weights of results, rows that sum to one, [L, M]; and the results that are left out less
// their estimates from all others, as a matrix [n, M].
template <class T>
static std::tuple<Tensor, Tensor, double, double> maps_of(const Regression& process) {
  const int64_t n = process[kMean].numel(), num_missing = process[kLeft].numel();
  const T* mean = numbers<T>(process[kMean]);
  const double precision = *numbers<double>(process[kPrecision]);
  const bool all = knows_inverse(process);
  Tensor weights = process[kWeights];
  if (!all) {
    const Tensor whole = whole_of(process[kHalf], process);
    weights = new_tensor({num_missing, n}, ScalarType::Double);
    const T* from = numbers<T>(whole);
    for (int64_t i = 0; i < num_missing; ++i, from += n) {
      double *to = numbers<double>(weights) + i * n, sum = 0;
      const double left = numbers<double>(process[kLeft])[i] / precision;
      for (int64_t j = 0; j < n; ++j) sum += to[j] = from[j] + left * mean[j];
      for (int64_t j = 0; j < n; ++j) to[j] += (1 - sum) / n;  // after rounding
    }
  }
  const Tensor some = all ? product(transposed(process[kFactor]), process[kFactor])
                          : whole_of(process[kOfLeftOut], process);
  const std::vector<int64_t> left_out = evenly(n, some.size(0));
  const Tensor residuals = new_tensor({some.size(0), n}, ScalarType::Double);
  double* to = numbers<double>(residuals);
  const T* from = numbers<T>(some);
  for (size_t i = 0; i < left_out.size(); ++i, to += n, from += n) {
    const double variance = numbers<double>(process[kLeftOutVariances])[i];
    const double own = mean[left_out[i]] / precision;
    for (int64_t j = 0; j < n; ++j) to[j] = (from[j] - own * mean[j]) * variance;
  }
  return {weights, residuals, std::nan(""), 1.0};
}

// The error of estimating results from each other, relative to their mean's, and the trust in the
// estimates: the slope of every result's regression on its estimate, less the others' mean; 0 if
// its gain may be chance.
static std::pair<double, double> judge(const double* residuals, const double* deviations, int64_t n,
                                       int64_t columns) {
  double total = 0, left = 0, square = 0;
  for (int64_t i = 0; i < n * columns; ++i) {
    const double estimated = deviations[i] - residuals[i];
    total += deviations[i] * deviations[i];
    left += residuals[i] * residuals[i];
    square += estimated * estimated;
  }
  const double error = total > 0 ? std::sqrt(left / total) : std::nan("");
  if (!(square > 0)) return {error, 1};
  const double slope = std::clamp((total + square - left) / (2 * square), 0.0, 1.0);
  std::vector<double> gains(n);
  double sum = 0, spread = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = i * columns; c < (i + 1) * columns; ++c) {
      const double estimated = deviations[c] - residuals[c];
      gains[i] += estimated * (2 * deviations[c] - slope * estimated) * (slope / square);
    }
    sum += gains[i];
  }
  for (const double gain : gains) spread += (gain - sum / n) * (gain - sum / n);
  return {error, sum > kTrustErrors * std::sqrt(spread) ? slope : 0};
}

template <class T>
static std::tuple<Tensor, Tensor, double, double> estimates_of(const Regression& process,
                                                               const Tensor& results,
                                                               std::optional<double> given) {
  const int64_t n = process[kMean].numel(), columns = results.size(1);
  const int64_t num_missing = process[kLeft].numel();
  const T* mean = numbers<T>(process[kMean]);
  const double precision = *numbers<double>(process[kPrecision]);
  const bool all = knows_inverse(process);
  const Scaled<T> scaled(results, n, columns);
  const Tensor half = half_of(scaled.y, process);
  const Tensor over = product(half, all ? process[kFactor] : transposed(process[kOfLeftOut]));
  const Tensor toward = product(process[kHalf], transposed(half));
  std::vector<double> means(columns);
  const T* y = numbers<T>(scaled.y);
  for (int64_t c = 0; c < columns; ++c) means[c] = inner(y + c * n, mean, n) / precision;
  // With the projection P = C^-1 - m m' / 1' m, m = C^-1 1, the residual of a result that is left
  // out is (P y) / P_ii, of variance 1 / P_ii.
  const int64_t num_left_out = over.size(1);
  const std::vector<int64_t> left_out = evenly(n, num_left_out);
  const Tensor residuals = new_tensor({num_left_out, columns}, ScalarType::Double);
  std::vector<double> deviations(num_left_out * columns);
  const double others = static_cast<double>(n) / std::max<int64_t>(n - 1, 1);
  const double* given_results = numbers<double>(results);
  double* each = numbers<double>(residuals);
  const T* products = numbers<T>(over);
  for (int64_t i = 0; i < num_left_out; ++i) {
    const double factor = numbers<double>(process[kLeftOutVariances])[i] * scaled.size;
    for (int64_t c = 0; c < columns; ++c) {
      const double off = products[c * num_left_out + i] - mean[left_out[i]] * means[c];
      each[i * columns + c] = off * factor;
      deviations[i * columns + c] = scaled.off(given_results, left_out[i], c, columns) * others;
    }
  }
  const auto [error, found] = judge(each, deviations.data(), num_left_out, columns);
  const double trust = given.value_or(found);
  const Tensor estimates = new_tensor({num_missing, columns}, ScalarType::Double);
  const T* from = numbers<T>(toward);
  double* to = numbers<double>(estimates);
  for (int64_t i = 0; i < num_missing; ++i, from += columns, to += columns) {
    const double left = numbers<double>(process[kLeft])[i];
    for (int64_t c = 0; c < columns; ++c) {
      to[c] = (from[c] + left * means[c]) * trust * scaled.size + scaled.mean[c];
    }
  }
  return {estimates, residuals, error, trust};
}

static bool is_float(const Regression& process) {
  return process[kMean].scalar_type() == ScalarType::Float;
}

// Returns estimates, residuals of results that are left out, the error and the trust, unless that
// is given; without results the matrices that make both of them.
std::tuple<Tensor, Tensor, double, double> estimate_cpu(const Regression& process,
                                                        const std::optional<Tensor>& results,
                                                        std::optional<double> trust) {
  check_process("estimate", process);
  if (!results) return is_float(process) ? maps_of<float>(process) : maps_of<double>(process);
  check_results("estimate", *results, process[kMean].numel());
  return is_float(process) ? estimates_of<float>(process, *results, trust)
                           : estimates_of<double>(process, *results, trust);
}

template <class T>
static std::tuple<Tensor, Tensor> coefficients_of(const Regression& process,
                                                  const Tensor& results) {
  const int64_t n = process[kMean].numel(), columns = results.size(1);
  const T* mean = numbers<T>(process[kMean]);
  const Scaled<T> scaled(results, n, columns);
  const Tensor whole = whole_of(half_of(scaled.y, process), process);
  const Tensor out = new_tensor({columns, n}, ScalarType::Float);
  const Tensor means = new_tensor({columns}, ScalarType::Float);
  const T *y = numbers<T>(scaled.y), *from = numbers<T>(whole);
  float* to = numbers<float>(out);
  for (int64_t c = 0; c < columns; ++c, y += n, from += n, to += n) {
    const double own = inner(y, mean, n) / *numbers<double>(process[kPrecision]);
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<float>((from[i] - own * mean[i]) * scaled.size);
    }
    numbers<float>(means)[c] = static_cast<float>(own * scaled.size + scaled.mean[c]);
  }
  return {out, means};
}

// Returns A, [C, M], and b, [C]: a row of covariances k with the results is estimated as A k + b.
std::tuple<Tensor, Tensor> coefficients_cpu(const Regression& process, const Tensor& results) {
  check_process("coefficients", process);
  check_results("coefficients", results, process[kMean].numel());
  return is_float(process) ? coefficients_of<float>(process, results)
                           : coefficients_of<double>(process, results);
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("regress", TORCH_BOX(&regress_cpu));
  m.impl("estimate", TORCH_BOX(&estimate_cpu));
  m.impl("coefficients", TORCH_BOX(&coefficients_cpu));
}

}  // namespace coded_torch
