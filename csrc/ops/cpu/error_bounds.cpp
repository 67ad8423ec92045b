// Error bounds of estimates, on the CPU only. coded_torch/input_space/_gaussian_process.py has the
// formulas.
#include <torch/csrc/stable/library.h>

#include "regression.h"

namespace coded_torch {

constexpr int64_t kRanking = 9;  // missing rows whose thresholds rank the results; not tuned

static void check_doubles(const char* op, std::initializer_list<Tensor> tensors) {
  for (const Tensor& given : tensors) {
    STD_TORCH_CHECK(
        given.scalar_type() == ScalarType::Double && given.is_contiguous() && given.is_cpu(), op,
        ": arguments must be float64, contiguous, on the CPU");
  }
}

// Of each of n results, how odd it looks if it is left out: the median of its thresholds [S, L, n]
// for a few rows.
static Tensor oddness_of(const Tensor& thresholds) {
  const int64_t rows = thresholds.size(1), n = thresholds.size(2), few = std::min(rows, kRanking);
  const Tensor out = new_tensor({n}, ScalarType::Double);
  const int64_t count = thresholds.size(0) * few;
  std::vector<double> own(count);
  for (int64_t j = 0; j < n && count; ++j) {
    for (int64_t i = 0; i < count; ++i) {
      const double each = numbers<double>(thresholds)[(i / few * rows + i % few) * n + j];
      own[i] = std::isnan(each) ? std::numeric_limits<double>::infinity() : each;
    }
    std::nth_element(own.begin(), own.begin() + (count - 1) / 2, own.end());
    numbers<double>(out)[j] = own[(count - 1) / 2];
  }
  return count ? out : rows_of(out, 0, 0);
}

std::tuple<Tensor, Tensor> error_thresholds_cpu(const Tensor& weights, const Tensor& variances,
                                                const Tensor& moved, const Tensor& known,
                                                double trust, int64_t count, int64_t most,
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
    const double* from = numbers<double>(known) + k * width;
    for (int64_t j = 0; j < n; ++j) rows[k * n + j] = from[some[j]];
  }
  const double* at = rows.data();
  const ThresholdsArgs args{at, at + n, at + 2 * n, at + 3 * n, n, count, trust, is_signed};
  for_blocks(num_missing, 64, [&](int64_t first, int64_t block) {
    std::vector<double> own(n);
    for (int64_t i = first; i < first + block; ++i) {
      const double* from = numbers<double>(weights) + i * width;
      for (int64_t j = 0; j < n; ++j) own[j] = from[some[j]];
      double* to = numbers<double>(out) + i * n;
      kernels().thresholds(args, numbers<double>(variances)[i], numbers<double>(moved)[i],
                           own.data(), to, is_signed ? to + num_missing * n : nullptr);
    }
  });
  return {out, oddness_of(out)};
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

// Of few outputs: thresholds of the errors of answers [L, C], from results [M, C], how odd results
// look, and the p-values of labels, by scores with their surrogates, if these are given. Without a
// regression, answers are the mean of the results.
std::tuple<Tensor, Tensor, Tensor> error_bounds_cpu(const Regression& process, const Tensor& given,
                                                    const Tensor& results, const Tensor& answers,
                                                    const std::optional<Tensor>& scores,
                                                    const std::optional<Tensor>& answered,
                                                    double trust, int64_t most) {
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
  std::vector<double> errors(n * columns), variances(n, 1.0), norms(4 * n);
  const double *of_residuals = numbers<double>(given), *of_answers = numbers<double>(answers);
  if (!is_mean) std::copy_n(numbers<double>(process[kLeftOutVariances]), n, variances.begin());
  std::copy(variances.begin(), variances.end(), norms.begin());
  for (int64_t i = 0; i < n; ++i) {
    double sums[3] = {};
    for (int64_t c = 0; c < columns; ++c) {
      const double deviation = scaled.off(from, left_out[i], c, columns) * others;
      const double residual = is_mean ? deviation : of_residuals[i * columns + c];
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
      const double off = of_answers[i * columns + c] - scaled.mean[c];
      sum += is_signed ? off : off * off;
    }
    numbers<double>(moved)[i] = is_signed ? sum : std::sqrt(sum);
  }
  // Around a mean, only the results that calibrate need a column, as all weights are 0: the whole
  // matrix would grow with the square of the batch.
  const std::vector<int64_t> used = evenly(n, is_mean ? most : n);
  const int64_t width = static_cast<int64_t>(used.size());
  const Tensor known = new_tensor({4, width}, ScalarType::Double);
  for (int64_t k = 0; k < 4; ++k) {
    for (int64_t j = 0; j < width; ++j) {
      numbers<double>(known)[k * width + j] = norms[k * n + used[j]];
    }
  }
  Tensor weights =
      is_mean ? new_tensor({num_missing, width}, ScalarType::Double) : process[kWeights];
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

  const auto [thresholds, oddness] =
      error_thresholds_cpu(weights, of_missing, moved, known, trust, count, most, is_signed);
  return {thresholds, oddness, p_values};
}

// Of thresholds [S, L, n], larger `by` so much for each row, the errors that bound rows at a level.
Tensor error_radii_cpu(const Tensor& thresholds, double level, const std::optional<Tensor>& by) {
  check_doubles("error_radii", {thresholds, by.value_or(thresholds)});
  STD_TORCH_CHECK(thresholds.dim() == 3 && (!by || by->numel() == thresholds.size(1)),
                  "error_radii: by must be one number for each of ", thresholds.size(1), " rows");
  const int64_t signs = thresholds.size(0), num_rows = thresholds.size(1), n = thresholds.size(2);
  const Tensor out = new_tensor({num_rows}, ScalarType::Double);
  std::vector<double> own(n);
  const double outside = std::floor((1 - level) * static_cast<double>(n + 1) + 1e-9);
  for (int64_t i = 0; i < num_rows; ++i) {
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
    if (by) radius += numbers<double>(*by)[i];  // rounding keeps the order of thresholds
    numbers<double>(out)[i] =
        n && !std::isnan(radius) ? radius : std::numeric_limits<double>::infinity();
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("error_bounds", TORCH_BOX(&error_bounds_cpu));
  m.impl("error_radii", TORCH_BOX(&error_radii_cpu));
  m.impl("error_thresholds", TORCH_BOX(&error_thresholds_cpu));
}

}  // namespace coded_torch
