// Estimates of missing rows, on the CPU only: choose_regression finds the metric and the length,
// regress makes the regression, and the others use it. coded_torch/ops.py says what each returns.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "distances.h"

namespace coded_torch {

// The lengths that compete, in steps of a path, with a half step to the better side; no others were
// better. (benchmarks distances)
constexpr double kLengths[] = {1, 2, 4, 8};
constexpr int64_t kUsualLength = 1;  // the place of the default
// Standard errors that a choice must gain, else the default stays. With one, another length lost up
// to half as much again where results are few; with two hardly any gain is lost. (benchmarks
// distances)
constexpr double kErrors = 2;
// If there are more results, evenly spaced ones are left out: all of 3,400 take .5 s. It is also
// the number up to which the inverse of the factor is known. (benchmarks accuracy)
constexpr int64_t kAllLeftOut = 512, kLeftOut = 256;
constexpr double kLeastPrecision = 1e-12;  // a single result has 0
// Standard errors that a gain over the mean must exceed. On outputs of noise, with 6 to 204
// results, the mean is estimated in 65 to 78 of 100 batches instead of 17 to 60. Where inputs
// explain little, and in residuals of students, the squared error stays within .2 %. A whole
// standard error costs up to 7 % there. (measured once; no benchmark keeps it)
constexpr double kTrustErrors = 0.5;

static double scale_of(double length) { return std::sqrt(5.0) / std::max(length, 1e-30); }

static void check_results(const char* op, const Tensor& results, int64_t count) {
  STD_TORCH_CHECK(results.scalar_type() == ScalarType::Double && results.dim() == 2 &&
                      results.is_contiguous() && results.is_cpu() && results.size(0) == count,
                  op, ": results must be float64, contiguous, [", count, ", C], on the CPU, got ",
                  torch::headeronly::toString(results.scalar_type()), " ", shape_str(results));
}

// Results [n, C] less their mean, [C, n], and of size 1 at most.
namespace {

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
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        numbers<T>(y)[c * n + i] = static_cast<T>(off(from, i, c, columns) / size);
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

}  // namespace

using Losses = std::vector<double>;

// How badly results [C, n] of size 1 at most are estimated, each from all others: the negative
// logarithm of the density that the regression gives to the result that is left out, at the best
// variance of the outputs. With residuals e, their variances v, and the mean q of e^2 / v, it is
// (log q + mean(e^2) / (q v) - 1 + log v) / 2. So a few inputs far from all others do not decide.
static Losses left_out_losses(const Tensor& squared, const Tensor& results, double length,
                              double nugget) {
  const int64_t columns = results.size(0), n = results.size(1);
  const int64_t stride = padded(n), wide = padded(columns);
  // Three rows behind the matrix are read, and nothing is made of them.
  const Floats memory = new_floats((n + 3) * stride + 4 * stride + 2 * n * wide);
  float* at = memory.get() + (n + 3) * stride;
  Losses losses(n);
  const LeftOutSpace space{memory.get(),
                           at,
                           at + stride,
                           at + 2 * stride,
                           at + 3 * stride,
                           at + 4 * stride,
                           at + 4 * stride + n * wide,
                           losses.data(),
                           stride,
                           wide};
  const LeftOutArgs args{numbers<float>(squared), numbers<float>(results), n, columns,
                         static_cast<float>(nugget)};
  if (!kernels().left_out(args, scale_of(length), space)) {
    return Losses(n, std::numeric_limits<double>::infinity());
  }
  double mean = 0;
  for (int64_t j = 0; j < n; ++j) {
    losses[j] = std::max(losses[j], kLeastPrecision);
    mean += space.squares[j] / columns / losses[j] / n;
  }
  mean = std::max(mean, 1e-300);
  for (int64_t j = 0; j < n; ++j) {
    const double square = space.squares[j] / columns / losses[j];
    losses[j] = (square / mean + std::log(mean) - 1 - std::log(losses[j])) / 2;
  }
  return losses;
}

static double mean_of(const Losses& losses) {
  return std::accumulate(losses.begin(), losses.end(), 0.0) / static_cast<double>(losses.size());
}

// The place of the least mean loss, or the default, -1 for none, if the gain may be chance.
static int64_t best_of(const std::vector<Losses>& losses, int64_t standard) {
  int64_t best = 0;
  std::vector<double> means;
  for (const Losses& each : losses) {
    means.push_back(mean_of(each));
    if (means.back() < means[best]) best = static_cast<int64_t>(means.size()) - 1;
  }
  if (standard < 0) return best;
  if (!(means[best] < means[standard])) return standard;
  if (std::isinf(means[standard])) return best;
  const Losses &one = losses[standard], &other = losses[best];
  const double n = static_cast<double>(one.size()), gain = means[standard] - means[best];
  double squares = 0;
  for (size_t i = 0; i < one.size(); ++i) {
    squares += (one[i] - other[i] - gain) * (one[i] - other[i] - gain);
  }
  return gain > kErrors * std::sqrt(squares / (n - 1) / n) ? best : standard;
}

// Returns the metric that estimates results of `some` rows best, and its length, in steps.
std::tuple<int64_t, double> choose_regression_cpu(const std::vector<Tensor>& coordinates,
                                                  const Tensor& units,
                                                  const std::optional<Tensor>& typical,
                                                  const Tensor& order, const Tensor& some,
                                                  const Tensor& results, int64_t standard,
                                                  std::optional<double> length, double nugget) {
  constexpr const char* kName = "choose_regression";
  const int64_t num_metrics = static_cast<int64_t>(coordinates.size());
  STD_TORCH_CHECK(num_metrics && standard < num_metrics && units.numel() == num_metrics &&
                      units.scalar_type() == ScalarType::Double,
                  kName, ": units must be float64, one for each of ", num_metrics, " metrics");
  const int64_t n = coordinates[0].size(0);
  for (const Tensor& rows : coordinates) {
    check_coordinates(kName, rows);
    STD_TORCH_CHECK(rows.size(0) == n, kName, ": coordinates must be of as many rows");
  }
  check_indices(kName, order, n);
  check_indices(kName, some, n);
  const int64_t num_some = some.numel();
  check_results(kName, results, num_some);
  STD_TORCH_CHECK(num_some > 1 && results.size(1) && order.numel() == n, kName,
                  ": results must be at least two, and the order of all rows");
  const bool* mask = mask_of(kName, typical, n);
  const int64_t *path = numbers<int64_t>(order), *places = numbers<int64_t>(some);
  const std::vector<int64_t> compared(places, places + num_some);
  std::vector<char> is_compared(n);
  for (const int64_t i : compared) is_compared[i] = 1;
  std::vector<int64_t> among;  // the compared rows along the path
  std::copy_if(path, path + n, std::back_inserter(among),
               [&](int64_t i) { return is_compared[i]; });
  const std::unique_ptr<bool[]> masked(new bool[num_some]);
  for (int64_t i = 0; i < num_some; ++i) masked[i] = !mask || mask[compared[i]];
  const Tensor y = Scaled<float>(results, num_some, results.size(1)).y;

  const auto unit = [&](int64_t metric) { return numbers<double>(units)[metric]; };
  std::vector<Tensor> squared(num_metrics, units);
  const auto measure = [&](int64_t metric) {
    std::vector<float> squares(num_some);
    squared[metric] = distances_of(some_rows(coordinates[metric], compared), unit(metric),
                                   mask ? masked.get() : nullptr, squares.data());
  };
  std::vector<Losses> found(num_metrics);
  int64_t metric = 0;
  // Metrics are compared by the steps among few results alone.
  for_blocks(num_metrics, 1, [&](int64_t i, int64_t) {
    measure(i);
    const double step = path_step(coordinates[i], among, mask, unit(i));
    if (num_metrics == 1) return;
    found[i] =
        left_out_losses(squared[i], y, length.value_or(kLengths[kUsualLength]) * step, nugget);
  });
  if (num_metrics > 1) metric = best_of(found, standard);
  if (length) return {metric, *length};

  const double step = path_step(coordinates[metric], {path, path + n}, mask, unit(metric));
  const auto tried = [&](const std::vector<double>& lengths) {
    std::vector<Losses> each(lengths.size());
    for_blocks(static_cast<int64_t>(lengths.size()), 1, [&](int64_t i, int64_t) {
      each[i] = left_out_losses(squared[metric], y, lengths[i] * step, nugget);
    });
    return each;
  };
  // No longer length and no half step is tried where losses rise.
  found = tried({kLengths[0], kLengths[1], kLengths[2]});
  int64_t at = best_of(found, kUsualLength);
  if (at == 2) {
    found.push_back(tried({kLengths[3]})[0]);
    at = best_of(found, kUsualLength);
  }
  const double chosen = kLengths[at];
  std::vector<double> near;
  bool is_shorter = true, is_longer = true;
  if (at > 0 && at + 1 < static_cast<int64_t>(found.size())) {  // to the side that is better
    is_longer = mean_of(found[at + 1]) < mean_of(found[at - 1]);
    is_shorter = !is_longer;
  }
  if (is_shorter) near.push_back(chosen / std::sqrt(2.0));
  if (is_longer) near.push_back(chosen * std::sqrt(2.0));
  std::vector<Losses> last = tried(near);
  last.push_back(found[at]);
  near.push_back(chosen);
  return {metric, near[best_of(last, static_cast<int64_t>(near.size()) - 1)]};
}

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
  for (size_t i = 0; i < squares.size(); ++i) {
    const double weight = weights[left_out[i]];
    numbers<double>(process[kLeftOutVariances])[i] =
        1 / std::max(squares[i] - weight * weight / precision, kLeastPrecision);
  }

  const Tensor covariances = new_tensor({num_missing, n}, kType<T>);
  for_blocks(num_missing, 16, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      problem.covariances<T>(missing[i], 0, numbers<T>(covariances) + i * n);
    }
  });
  process[kHalf] = half_of(covariances, process);
  double* left = numbers<double>(process[kLeft]);
  for (int64_t i = 0; i < num_missing; ++i) {
    const T* half = numbers<T>(process[kHalf]) + i * n;
    left[i] = 1 - inner(numbers<T>(covariances) + i * n, weights, n);
    const double variance = 1 + nugget - inner(half, half, n) + left[i] * left[i] / precision;
    numbers<double>(process[kVariances])[i] = std::max(variance, nugget);
  }
  const Tensor some =
      product(process[kHalf], all ? process[kFactor] : transposed(process[kOfLeftOut]));
  const int64_t width = some.size(1);
  process[kWeights] = new_tensor({num_missing, width}, ScalarType::Double);
  for (int64_t i = 0; i < num_missing; ++i) {
    double* to = numbers<double>(process[kWeights]) + i * width;
    double sum = 0;
    for (int64_t j = 0; j < width; ++j) {
      to[j] = numbers<T>(some)[i * width + j] + left[i] / precision * weights[left_out[j]];
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

static void check_process(const char* op, const Regression& process) {
  STD_TORCH_CHECK(process.size() == kNumFields, op, ": regression must be one of regress");
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
    for (int64_t i = 0; i < num_missing; ++i) {
      double *to = numbers<double>(weights) + i * n, sum = 0;
      const double left = numbers<double>(process[kLeft])[i] / precision;
      for (int64_t j = 0; j < n; ++j) sum += to[j] = numbers<T>(whole)[i * n + j] + left * mean[j];
      for (int64_t j = 0; j < n; ++j) to[j] += (1 - sum) / n;  // after rounding
    }
  }
  const Tensor some = all ? product(transposed(process[kFactor]), process[kFactor])
                          : whole_of(process[kOfLeftOut], process);
  const std::vector<int64_t> left_out = evenly(n, some.size(0));
  const Tensor residuals = new_tensor({some.size(0), n}, ScalarType::Double);
  for (int64_t i = 0; i < some.size(0); ++i) {
    const double variance = numbers<double>(process[kLeftOutVariances])[i];
    const double own = mean[left_out[i]] / precision;
    for (int64_t j = 0; j < n; ++j) {
      numbers<double>(residuals)[i * n + j] =
          (numbers<T>(some)[i * n + j] - own * mean[j]) * variance;
    }
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
  for (int64_t c = 0; c < columns; ++c) {
    means[c] = inner(numbers<T>(scaled.y) + c * n, mean, n) / precision;
  }
  // With the projection P = C^-1 - m m' / 1' m, m = C^-1 1, the residual of a result that is left
  // out is (P y) / P_ii, of variance 1 / P_ii.
  const int64_t num_left_out = over.size(1);
  const std::vector<int64_t> left_out = evenly(n, num_left_out);
  const Tensor residuals = new_tensor({num_left_out, columns}, ScalarType::Double);
  std::vector<double> deviations(num_left_out * columns);
  const double others = static_cast<double>(n) / std::max<int64_t>(n - 1, 1);
  for (int64_t i = 0; i < num_left_out; ++i) {
    const double factor = numbers<double>(process[kLeftOutVariances])[i] * scaled.size;
    for (int64_t c = 0; c < columns; ++c) {
      const double off = numbers<T>(over)[c * num_left_out + i] - mean[left_out[i]] * means[c];
      numbers<double>(residuals)[i * columns + c] = off * factor;
      deviations[i * columns + c] =
          scaled.off(numbers<double>(results), left_out[i], c, columns) * others;
    }
  }
  const auto [error, found] =
      judge(numbers<double>(residuals), deviations.data(), num_left_out, columns);
  const double trust = given.value_or(found);
  const Tensor estimates = new_tensor({num_missing, columns}, ScalarType::Double);
  for (int64_t i = 0; i < num_missing; ++i) {
    const double left = numbers<double>(process[kLeft])[i];
    for (int64_t c = 0; c < columns; ++c) {
      const double off = numbers<T>(toward)[i * columns + c] + left * means[c];
      numbers<double>(estimates)[i * columns + c] = off * trust * scaled.size + scaled.mean[c];
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
  for (int64_t c = 0; c < columns; ++c) {
    const double own =
        inner(numbers<T>(scaled.y) + c * n, mean, n) / *numbers<double>(process[kPrecision]);
    for (int64_t i = 0; i < n; ++i) {
      numbers<float>(out)[c * n + i] =
          static_cast<float>((numbers<T>(whole)[c * n + i] - own * mean[i]) * scaled.size);
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

static void check_doubles(const char* op, std::initializer_list<Tensor> tensors) {
  for (const Tensor& given : tensors) {
    STD_TORCH_CHECK(
        given.scalar_type() == ScalarType::Double && given.is_contiguous() && given.is_cpu(), op,
        ": arguments must be float64, contiguous, on the CPU");
  }
}

Tensor error_thresholds_cpu(const Tensor& weights, const Tensor& variances, const Tensor& moved,
                            const Tensor& known, double trust, int64_t count, int64_t most,
                            bool is_signed) {
  check_doubles("error_thresholds", {weights, variances, moved, known});
  STD_TORCH_CHECK(weights.dim() == 2 && known.dim() == 2 && known.size(0) == 4 &&
                      known.size(1) == weights.size(1) && variances.numel() == weights.size(0) &&
                      moved.numel() == weights.size(0),
                  "error_thresholds: weights, variances, moved and known must be [L, n], [L], [L] "
                  "and [4, n], got ",
                  shape_str(weights), ", ", shape_str(variances), ", ", shape_str(moved), " and ",
                  shape_str(known));
  const int64_t num_missing = weights.size(0), width = weights.size(1);
  const std::vector<int64_t> some = evenly(width, most);
  const int64_t n = static_cast<int64_t>(some.size());
  const Tensor out = new_tensor({is_signed ? 2 : 1, num_missing, n}, ScalarType::Double);
  std::vector<double> rows(4 * n);
  for (int64_t k = 0; k < 4; ++k) {
    for (int64_t j = 0; j < n; ++j) rows[k * n + j] = numbers<double>(known)[k * width + some[j]];
  }
  const double* at = rows.data();
  const ThresholdsArgs args{at, at + n, at + 2 * n, at + 3 * n, n, count, trust, is_signed};
  for_blocks(num_missing, 64, [&](int64_t first, int64_t block) {
    std::vector<double> own(n);
    for (int64_t i = first; i < first + block; ++i) {
      for (int64_t j = 0; j < n; ++j) own[j] = numbers<double>(weights)[i * width + some[j]];
      double* to = numbers<double>(out) + i * n;
      kernels().thresholds(args, numbers<double>(variances)[i], numbers<double>(moved)[i],
                           own.data(), to, is_signed ? to + num_missing * n : nullptr);
    }
  });
  return out;
}

// How much the largest output is over the second, and which it is.
static std::pair<double, int64_t> margin(const double* outputs, int64_t columns) {
  double largest = -std::numeric_limits<double>::infinity(), second = largest;
  int64_t at = 0;
  for (int64_t c = 0; c < columns; ++c) {
    if (outputs[c] > largest) {
      second = largest;
      largest = outputs[c];
      at = c;
    } else {
      second = std::max(second, outputs[c]);
    }
  }
  return {largest - second, at};
}

// Of few outputs: thresholds of the errors of answers [L, C], from results [M, C]; and the p-values
// of their labels, by scores with their surrogates, if these are given. Without a regression,
// answers are the mean of the results.
std::tuple<Tensor, Tensor> error_bounds_cpu(const Regression& process, const Tensor& given,
                                            const Tensor& results, const Tensor& answers,
                                            const std::optional<Tensor>& scores,
                                            const std::optional<Tensor>& answered, double trust,
                                            int64_t most) {
  check_doubles("error_bounds", {given, results, answers});
  const bool is_mean = process.empty();
  if (!is_mean) check_process("error_bounds", process);
  const int64_t count = results.size(0), columns = results.size(1), num_missing = answers.size(0);
  const int64_t n = is_mean ? count : given.size(0);
  const bool is_signed = columns == 1;
  STD_TORCH_CHECK(answers.size(1) == columns && (is_mean || given.size(1) == columns),
                  "error_bounds: residuals, results and answers must have as many columns");
  STD_TORCH_CHECK(is_mean || (n <= count && process[kLeftOutVariances].numel() == n),
                  "error_bounds: residuals must be those of the regression");
  STD_TORCH_CHECK(
      scores.has_value() == answered.has_value() &&
          (!scores || (scores->size(0) == count && scores->size(1) == columns &&
                       answered->size(0) == num_missing && answered->size(1) == columns)),
      "error_bounds: scores must have the shapes of results and answers");
  const std::vector<int64_t> left_out = evenly(count, n);
  const Scaled<double> scaled(results, count, columns);
  const double others = static_cast<double>(count) / std::max<int64_t>(count - 1, 1);
  const double* from = numbers<double>(results);
  std::vector<double> errors(n * columns), variances(n, 1.0);
  const Tensor known = new_tensor({4, n}, ScalarType::Double);
  double* norms = numbers<double>(known);
  if (!is_mean) std::copy_n(numbers<double>(process[kLeftOutVariances]), n, variances.begin());
  std::copy(variances.begin(), variances.end(), norms);
  for (int64_t i = 0; i < n; ++i) {
    double sums[3] = {};
    for (int64_t c = 0; c < columns; ++c) {
      const double deviation = scaled.off(from, left_out[i], c, columns) * others;
      const double residual = is_mean ? deviation : numbers<double>(given)[i * columns + c];
      const double error = deviation + trust * (residual - deviation);
      errors[i * columns + c] = error;
      const double each[3] = {residual, error, deviation};
      for (int k = 0; k < 3; ++k) sums[k] += is_signed ? each[k] : each[k] * each[k];
    }
    for (int k = 0; k < 3; ++k) norms[(k + 1) * n + i] = is_signed ? sums[k] : std::sqrt(sums[k]);
  }
  const Tensor moved = new_tensor({num_missing}, ScalarType::Double);
  for (int64_t i = 0; i < num_missing; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const double off = numbers<double>(answers)[i * columns + c] - scaled.mean[c];
      sum += is_signed ? off : off * off;
    }
    numbers<double>(moved)[i] = is_signed ? sum : std::sqrt(sum);
  }
  Tensor weights = is_mean ? new_tensor({num_missing, n}, ScalarType::Double) : process[kWeights];
  Tensor of_missing = is_mean ? new_tensor({num_missing}, ScalarType::Double) : process[kVariances];
  if (is_mean) {
    std::fill_n(numbers<double>(weights), weights.numel(), 0.0);
    std::fill_n(numbers<double>(of_missing), num_missing, 1.0);
  }

  const Tensor p_values = new_tensor({scores ? num_missing : 0}, ScalarType::Double);
  if (scores) {
    check_doubles("error_bounds", {*scores, *answered});
    std::vector<double> worse, found(columns);
    for (int64_t i = 0; i < n; ++i) {
      const double* outputs = numbers<double>(*scores) + left_out[i] * columns;
      for (int64_t c = 0; c < columns; ++c) found[c] = outputs[c] - errors[i * columns + c];
      const auto [size, label] = margin(found.data(), columns);
      if (label != margin(outputs, columns).second) worse.push_back(size / std::sqrt(variances[i]));
    }
    std::sort(worse.begin(), worse.end());
    for (int64_t i = 0; i < num_missing; ++i) {
      const double size = margin(numbers<double>(*answered) + i * columns, columns).first /
                          std::sqrt(numbers<double>(of_missing)[i]);
      const auto larger = worse.end() - std::lower_bound(worse.begin(), worse.end(), size);
      numbers<double>(p_values)[i] =
          (1.0 + static_cast<double>(larger)) / static_cast<double>(n + 1);
    }
  }

  return {error_thresholds_cpu(weights, of_missing, moved, known, trust, count, most, is_signed),
          p_values};
}

// Of thresholds [S, L, n], and the level of each row, the errors that bound it: [L].
Tensor error_radii_cpu(const Tensor& thresholds, const Tensor& levels) {
  check_doubles("error_radii", {thresholds, levels});
  STD_TORCH_CHECK(thresholds.dim() == 3 && levels.numel() == thresholds.size(1),
                  "error_radii: levels must be one for each of ", thresholds.size(1), " rows");
  const int64_t signs = thresholds.size(0), num_rows = thresholds.size(1), n = thresholds.size(2);
  const Tensor out = new_tensor({num_rows}, ScalarType::Double);
  std::vector<double> own(n);
  for (int64_t i = 0; i < num_rows; ++i) {
    const double level = numbers<double>(levels)[i];
    const double outside = std::floor((1 - level) * static_cast<double>(n + 1) + 1e-9);
    double radius = outside >= 1 ? 0 : std::numeric_limits<double>::infinity();
    for (int64_t s = 0; s < signs && outside >= 1 && n; ++s) {
      const double* each = numbers<double>(thresholds) + (s * num_rows + i) * n;
      std::transform(each, each + n, own.begin(), [](double x) {
        return std::isnan(x) ? std::numeric_limits<double>::infinity() : x;
      });
      const auto at = own.begin() + std::max<int64_t>(n - static_cast<int64_t>(outside), 0);
      std::nth_element(own.begin(), at, own.end());
      radius = std::max(radius, *at);
    }
    numbers<double>(out)[i] = n ? radius : std::numeric_limits<double>::infinity();
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("choose_regression", TORCH_BOX(&choose_regression_cpu));
  m.impl("regress", TORCH_BOX(&regress_cpu));
  m.impl("estimate", TORCH_BOX(&estimate_cpu));
  m.impl("coefficients", TORCH_BOX(&coefficients_cpu));
  m.impl("error_bounds", TORCH_BOX(&error_bounds_cpu));
  m.impl("error_radii", TORCH_BOX(&error_radii_cpu));
  m.impl("error_thresholds", TORCH_BOX(&error_thresholds_cpu));
}

}  // namespace coded_torch
