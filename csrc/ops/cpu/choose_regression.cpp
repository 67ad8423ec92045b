// Which metric and length estimate results best, on the CPU only. coded_torch/ops.py says what the
// operator returns.
#include <torch/csrc/stable/library.h>

#include "regression.h"

namespace coded_torch {

// The lengths that compete, in steps of a path, with a half step to the better side; no others were
// better. (benchmarks distances)
constexpr double kLengths[] = {1, 2, 4, 8};
constexpr int64_t kUsualLength = 1;  // the place of the default
// Standard errors that a choice must gain, else the default stays. With one, another length lost up
// to half as much again where results are few; with two hardly any gain is lost. (benchmarks
// distances)
constexpr double kErrors = 2;

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
                                                  const std::vector<double>& units,
                                                  const std::optional<Tensor>& typical,
                                                  const Tensor& order, const Tensor& some,
                                                  const Tensor& results, int64_t standard,
                                                  std::optional<double> length, double nugget) {
  constexpr const char* kName = "choose_regression";
  const int64_t num_metrics = static_cast<int64_t>(coordinates.size());
  STD_TORCH_CHECK(
      num_metrics && standard < num_metrics && static_cast<int64_t>(units.size()) == num_metrics,
      kName, ": units must be one for each of ", num_metrics, " metrics");
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

  std::vector<Tensor> squared(num_metrics, y);
  const auto measure = [&](int64_t metric) {
    std::vector<float> squares(num_some);
    squared[metric] = distances_of(some_rows(coordinates[metric], compared), units[metric],
                                   mask ? masked.get() : nullptr, squares.data());
  };
  std::vector<Losses> found(num_metrics);
  int64_t metric = 0;
  // Metrics are compared by the steps among few results alone.
  for_blocks(num_metrics, 1, [&](int64_t i, int64_t) {
    measure(i);
    const double step = path_step(coordinates[i], among, mask, units[i]);
    if (num_metrics == 1) return;
    found[i] =
        left_out_losses(squared[i], y, length.value_or(kLengths[kUsualLength]) * step, nugget);
  });
  if (num_metrics > 1) metric = best_of(found, standard);
  if (length) return {metric, *length};

  const double step = path_step(coordinates[metric], {path, path + n}, mask, units[metric]);
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

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("choose_regression", TORCH_BOX(&choose_regression_cpu));
}

}  // namespace coded_torch
