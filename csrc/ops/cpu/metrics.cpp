// fit_metrics, squared_distances and typical_rows, on the CPU only: features come to the host.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <tuple>

#include "../../math/short_path.h"
#include "distances.h"

namespace coded_torch {

// Rows so many times as long as nine tenths of them do not determine metrics, and say nothing of
// the others. Rows of one scale seldom differ by more; it was not tuned.
constexpr double kLong = 8;
// Features that vary less, relative to the overall spread, are rounding. In float32 a constant
// feature has 1e-7; it was not tuned.
constexpr double kNothing = 1e-6;
// The rows that determine the covariance: a quarter of the batch, within these limits. Of 1,000
// rows 256 estimate as well as 512; of 3,000 they had 1 % more error (benchmarks/tasks.py).
constexpr int64_t kLeastLandmarks = 256, kMostLandmarks = 512;

enum class Kind : int64_t { kRows, kSpread, kPooled };

static void check_rows(const char* op, const Tensor& rows) {
  const ScalarType dtype = rows.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Double || dtype == ScalarType::Float) && rows.dim() == 2 &&
                      rows.is_contiguous() && rows.is_cpu(),
                  op, ": rows must be float64 or float32, contiguous, [n, d], on the CPU, got ",
                  torch::headeronly::toString(dtype), " ", shape_str(rows));
}

template <class T>
static double squared_length(const T* row, int64_t width) {
  double sums[4] = {};
  for (int64_t k = 0; k < width; ++k) sums[k % 4] += static_cast<double>(row[k]) * row[k];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The lengths of rows. Squares of float32 may overflow, or vanish.
static std::vector<double> lengths_of(const Tensor& rows) {
  const int64_t n = rows.size(0), width = rows.size(1);
  std::vector<double> lengths(n);
  bool is_exact = rows.scalar_type() == ScalarType::Float;
  if (is_exact) {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      lengths[i] = kernels().apart(numbers<float>(rows) + i * width, nullptr, width);
      largest = lengths[i] <= largest ? largest : lengths[i];  // NaN, too
    }
    is_exact = largest > 1e-30 && largest < 1e30;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (!is_exact && rows.scalar_type() == ScalarType::Float) {
      lengths[i] = squared_length(numbers<float>(rows) + i * width, width);
    } else if (!is_exact) {
      lengths[i] = squared_length(numbers<double>(rows) + i * width, width);
    }
    lengths[i] = std::sqrt(lengths[i]);
  }
  return lengths;
}

Tensor typical_rows_cpu(const std::vector<Tensor>& leaves) {
  const int64_t n = leaves[0].size(0);
  std::vector<char> typical(n, 1);
  std::vector<std::vector<double>> lengths;
  for (const Tensor& rows : leaves) {
    check_rows("typical_rows", rows);
    STD_TORCH_CHECK(rows.size(0) == n, "typical_rows: rows must be as many in each tensor");
    lengths.push_back(lengths_of(rows));
    for (int64_t i = 0; i < n; ++i) typical[i] &= std::isfinite(lengths.back()[i]);
  }
  const int64_t count = std::count(typical.begin(), typical.end(), 1);
  const std::vector<char> finite = typical;
  for (const std::vector<double>& each : lengths) {
    std::vector<double> some;
    for (int64_t i = 0; i < n; ++i) {
      if (finite[i]) some.push_back(each[i]);
    }
    if (!count) break;
    const auto at = some.begin() + 9 * (count - 1) / 10;
    std::nth_element(some.begin(), at, some.end());
    // If most rows are 0, the others are not too long.
    for (int64_t i = 0; i < n; ++i) typical[i] &= *at == 0 || each[i] <= kLong * *at;
  }
  const Tensor out = new_tensor({n}, ScalarType::Bool);
  std::copy(typical.begin(), typical.end(), numbers<bool>(out));
  return out;
}

// The rows of one input less their mean, and their spreads.
struct Centred {
  std::vector<float> rows;            // [n, width]; 0 if not typical
  std::vector<double> mean, squares;  // [width]; squares are summed over rows
  double factor = 1, spread = 0;      // 0 if all are equal
  int64_t width = 0;
};

// The rows that determine metrics.
struct Typical {
  const bool* mask;  // [n]; null if all do
  int64_t count;
  bool operator()(int64_t row) const { return !mask || mask[row]; }
};

template <class T>
static Centred centred(const Tensor& tensor, const Typical& typical,
                       const FeatureKernels<T>& kernels) {
  const T* x = numbers<T>(tensor);
  const int64_t n = tensor.size(0), width = tensor.size(1);
  Centred found;
  found.width = width;
  found.mean.resize(width);
  found.squares.resize(width);
  found.rows.resize(n * width);
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (typical(i)) largest = std::max<double>(largest, kernels.largest(x + i * width, width));
  }
  if (!(largest > 1e-8 && largest < 1e8)) {  // squares would overflow, or vanish
    const double size = std::max<double>(largest, std::numeric_limits<T>::min());
    found.factor = 1 / size;
    largest /= size;
  }
  const double count = std::max<double>(static_cast<double>(typical.count), 1);
  for (int64_t i = 0; i < n; ++i) {
    if (typical(i)) kernels.add(x + i * width, width, found.factor / count, found.mean.data());
  }
  for (int64_t i = 0; i < n; ++i) {
    if (!typical(i)) continue;
    kernels.centre(x + i * width, found.mean.data(), width, found.factor,
                   found.rows.data() + i * width, found.squares.data());
  }
  double total = 0;
  for (const double square : found.squares) total += square;
  const double spread = std::sqrt(total / count);
  const double rounding =
      kRoundings * std::numeric_limits<T>::epsilon() * std::sqrt(static_cast<double>(width));
  if (spread > rounding * largest) found.spread = spread;
  return found;
}

// The factors by which features of root mean square length 1 are made of centred rows.
static std::vector<double> factors_of(const Centred& leaf, bool by_spread, double count) {
  std::vector<double> factors(leaf.width, leaf.spread > 0 ? 1 / leaf.spread : 0);
  if (!by_spread) return factors;
  const double least = kNothing * leaf.spread / std::sqrt(static_cast<double>(leaf.width));
  int64_t vary = 0;
  for (int64_t k = 0; k < leaf.width; ++k) {
    const double own = std::sqrt(leaf.squares[k] / count);
    factors[k] = own > least ? 1 / own : 0;
    vary += own > least;
  }
  for (double& factor : factors)
    factor /= std::sqrt(static_cast<double>(std::max<int64_t>(vary, 1)));
  return factors;
}

namespace {

// What metrics of the same features share.
struct Features {
  Tensor rows, map;                // [n, f]; [2, f], float64: of inputs x, x * map[0] - map[1]
  std::optional<Tensor> products;  // with the landmarks, [n, L]
};

class Fit {
 public:
  Fit(const std::vector<Tensor>& leaves, const std::vector<Tensor>& pooled, Typical typical)
      : typical_(typical), n_(leaves[0].size(0)) {
    for (const Tensor& leaf : leaves) leaves_.push_back(fitted(leaf));
    for (const Tensor& leaf : pooled) {
      pooled_.emplace_back();
      if (leaf.size(0)) pooled_.back() = fitted(leaf);
    }
    std::vector<int64_t> all;
    for (int64_t i = 0; i < n_; ++i) {
      if (typical_(i)) all.push_back(i);
    }
    const int64_t most = std::clamp(typical_.count / 4, kLeastLandmarks, kMostLandmarks);
    for (const int64_t i : evenly(typical_.count, most)) landmarks_.push_back(all[i]);
  }

  // Features by a kind; null if it applies to no leaf, or they are not finite.
  Features* features(Kind kind, int64_t rows_each) {
    std::vector<Kind> kinds;
    bool applies = kind == Kind::kRows;
    for (size_t i = 0; i < leaves_.size(); ++i) {
      bool fits = kind == Kind::kPooled && pooled_[i].width;
      if (kind == Kind::kSpread) {
        const int64_t width = leaves_[i].width;
        fits = std::min(typical_.count, width) >= 2 && rows_each * width <= typical_.count;
      }
      kinds.push_back(fits ? kind : Kind::kRows);
      applies |= fits;
    }
    if (!applies) return nullptr;
    const auto [at, is_new] = made_.try_emplace(kinds);
    if (is_new) at->second = make(kinds);
    return at->second ? &*at->second : nullptr;
  }

  // Rows Z with Z Z' = X C (C + shrinkage * tr C)^-1 X' up to a factor, C = X' X, of features X.
  Tensor coordinates(Features& features, double shrinkage) {
    if (shrinkage == 0) return features.rows;
    const int64_t size = static_cast<int64_t>(landmarks_.size());
    if (!features.products) features.products = products(features.rows);
    const Tensor& products = *features.products;
    const float* from = numbers<float>(products);
    Padded system(size);
    double trace = 0;
    for (int64_t i = 0; i < size; ++i) {
      std::copy_n(from + landmarks_[i] * size, size, system.row(i));
      trace += system.row(i)[i];
    }
    if (shrinkage == std::numeric_limits<double>::infinity() || trace == 0) return products;
    for (int64_t i = 0; i < size; ++i) system.row(i)[i] += static_cast<float>(shrinkage * trace);
    // X X_S' (X_S X_S' + tau)^-1 X_S X' of landmarks X_S: no two large terms are subtracted.
    const std::optional<Tensor> inverse = system.inverse_factor();
    STD_TORCH_CHECK(inverse, "fit_metrics: the landmarks' products have no factorisation");
    const Tensor out = new_tensor({n_, size}, ScalarType::Float);
    for (int64_t first = 0; first < size; first += kColumns) {  // of a triangle
      const int64_t count = std::min(kColumns, size - first), width = first + count;
      const Tensor some = columns_of(rows_of(*inverse, first, count), 0, width);
      multiply(columns_of(out, first, count), columns_of(products, 0, width), transposed(some));
    }
    return out;
  }

 private:
  static constexpr int64_t kColumns = 64;

  Centred fitted(const Tensor& leaf) const {
    check_rows("fit_metrics", leaf);
    STD_TORCH_CHECK(leaf.size(0) == n_, "fit_metrics: rows must be as many in each tensor");
    const bool is_double = leaf.scalar_type() == ScalarType::Double;
    return is_double ? centred<double>(leaf, typical_, kernels().doubles)
                     : centred<float>(leaf, typical_, kernels().floats);
  }

  std::optional<Features> make(const std::vector<Kind>& kinds) {
    int64_t width = 0;
    for (size_t i = 0; i < kinds.size(); ++i) width += of(i, kinds[i]).width;
    Features made{new_tensor({n_, width}, ScalarType::Float),
                  new_tensor({2, width}, ScalarType::Double), std::nullopt};
    int64_t first = 0;
    double total = 0;
    for (size_t i = 0; i < kinds.size(); ++i) {
      const Centred& leaf = of(i, kinds[i]);
      const std::vector<double> factors =
          factors_of(leaf, kinds[i] == Kind::kSpread,
                     std::max<double>(static_cast<double>(typical_.count), 1));
      const std::vector<float> rounded(factors.begin(), factors.end());
      double* map = numbers<double>(made.map);
      for (int64_t k = 0; k < leaf.width; ++k) {
        map[first + k] = factors[k] * leaf.factor;
        map[width + first + k] = factors[k] * leaf.mean[k];
        total += leaf.squares[k];
      }
      for (int64_t row = 0; row < n_; ++row) {
        kernels().scale(leaf.rows.data() + row * leaf.width, rounded.data(), leaf.width,
                        numbers<float>(made.rows) + row * width + first);
      }
      first += leaf.width;
    }
    if (!std::isfinite(total)) return std::nullopt;
    return made;
  }

  const Centred& of(size_t i, Kind kind) const {
    return kind == Kind::kPooled ? pooled_[i] : leaves_[i];
  }

  Tensor products(const Tensor& rows) const {
    const int64_t size = static_cast<int64_t>(landmarks_.size());
    if (size == n_) {
      const Tensor out = inner_products(rows);
      mirror(numbers<float>(out), n_);
      return out;
    }
    return product(rows, transposed(some_rows(rows, landmarks_)));
  }

  Typical typical_;
  int64_t n_;
  std::vector<Centred> leaves_, pooled_;
  std::vector<int64_t> landmarks_;
  std::map<std::vector<Kind>, std::optional<Features>> made_;
};

}  // namespace

std::vector<Tensor> fit_metrics_cpu(const std::vector<Tensor>& leaves,
                                    const std::vector<Tensor>& pooled,
                                    const std::optional<Tensor>& typical,
                                    const std::vector<int64_t>& kinds,
                                    const std::vector<double>& shrinkages,
                                    const std::vector<int64_t>& rows_each) {
  STD_TORCH_CHECK(!leaves.empty() && pooled.size() == leaves.size() &&
                      shrinkages.size() == kinds.size() && rows_each.size() == kinds.size(),
                  "fit_metrics: rows and pooled, and what describes metrics, must be as many");
  const int64_t n = leaves[0].size(0);
  const bool* mask = mask_of("fit_metrics", typical, n);
  const int64_t count = mask ? std::count(mask, mask + n, true) : n;
  Fit fit(leaves, pooled, {mask, count});
  std::vector<Tensor> out;
  const Tensor units = new_tensor({static_cast<int64_t>(kinds.size())}, ScalarType::Double);
  for (size_t i = 0; i < kinds.size(); ++i) {
    Features* features = fit.features(static_cast<Kind>(kinds[i]), rows_each[i]);
    double& unit = numbers<double>(units)[i] = 0;
    if (!features) {
      out.push_back(new_tensor({0, 0}, ScalarType::Float));
      out.push_back(new_tensor({2, 0}, ScalarType::Double));
      continue;
    }
    const Tensor rows = fit.coordinates(*features, shrinkages[i]);
    const int64_t width = rows.size(1);
    for (int64_t row = 0; row < n; ++row) {
      unit += kernels().apart(numbers<float>(rows) + row * width, nullptr, width);
    }
    unit /= std::max<double>(static_cast<double>(count), 1);
    out.push_back(rows);
    out.push_back(features->map);
  }
  out.push_back(units);
  return out;
}

// Returns distances, squares, the order, which is a new path if none is given, and its step.
std::tuple<Tensor, Tensor, Tensor, double> squared_distances_cpu(
    const Tensor& rows, double unit, const std::optional<Tensor>& typical,
    const std::optional<Tensor>& order) {
  check_coordinates("squared_distances", rows);
  const int64_t n = rows.size(0);
  const bool* mask = mask_of("squared_distances", typical, n);
  const Tensor squares = new_tensor({n}, ScalarType::Float);
  const Tensor out = distances_of(rows, unit, mask, numbers<float>(squares));
  Tensor path = order ? *order : new_tensor({n}, ScalarType::Long);
  if (!order) {
    const float* from = numbers<float>(out);
    const std::unique_ptr<float[]> roots(new float[n * n]);
    for_blocks(n, 64, [&](int64_t first, int64_t count) {
      for (int64_t i = first * n; i < (first + count) * n; ++i) roots[i] = std::sqrt(from[i]);
    });
    short_path(roots.get(), n, numbers<int64_t>(path));
  }
  check_indices("squared_distances", path, n);
  const int64_t* places = numbers<int64_t>(path);
  const double step = path_step(rows, {places, places + path.numel()}, mask, unit);
  return {out, squares, path, step};
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("fit_metrics", TORCH_BOX(&fit_metrics_cpu));
  m.impl("squared_distances", TORCH_BOX(&squared_distances_cpu));
  m.impl("typical_rows", TORCH_BOX(&typical_rows_cpu));
}

}  // namespace coded_torch
