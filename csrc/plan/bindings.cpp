// coded_torch._plan: spline plans and paths, numpy arrays in and out. No torch header here:
// pybind11 and the stable ABI do not mix in one translation unit.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../math/short_path.h"
#include "../math/spline_plan.h"

namespace py = pybind11;
using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Arguments are validated in Python; this only keeps a wrong shape from reading out of bounds.
static py::tuple spline_plan(const Array& knots, const Array& penalties, const Array& points) {
  if (knots.ndim() != 2 || penalties.ndim() != 2 || points.ndim() != 2 ||
      penalties.shape(0) != knots.shape(0) || penalties.shape(1) != knots.shape(1) ||
      points.shape(0) != knots.shape(0) || knots.shape(1) < 1) {
    throw py::value_error(
        "spline_plan: knots and penalties must be [P, n] with n >= 1, points [P, N]");
  }
  const int64_t plans = knots.shape(0), n = knots.shape(1), num_points = points.shape(1);
  const int64_t row = coded_torch::coefficients_size(n, num_points);
  const int64_t entries = coded_torch::schedule_size(n, num_points);
  py::array_t<double> coefficients({plans, row});
  py::array_t<int32_t> schedule({plans, entries});
  for (int64_t p = 0; p < plans; ++p) {
    coded_torch::plan_spline(
        knots.data() + p * n, penalties.data() + p * n, n, points.data() + p * num_points,
        num_points, coefficients.mutable_data() + p * row, schedule.mutable_data() + p * entries);
  }
  return py::make_tuple(coefficients, schedule);
}

static std::string text(double number) { return py::str(py::float_(number)); }

[[noreturn]] static void refuse(const std::string& argument, const std::string& reason) {
  throw py::value_error("smoothing spline: " + argument + " must " + reason);
}

static void check_vector(const std::string& name, const Array& numbers) {
  if (numbers.ndim() != 1) {
    const std::string shape = py::str(numbers.attr("shape"));
    refuse(name, "have one dimension, got shape " + shape);
  }
  for (int64_t i = 0; i < numbers.size(); ++i) {
    const double number = numbers.data()[i];
    if (std::isfinite(number)) continue;
    refuse(name, "be finite, got " + name + "[" + std::to_string(i) + "] = " + text(number));
  }
}

static void check_knots(const Array& knots) {
  check_vector("knots", knots);
  if (knots.size() < 1) refuse("knots", "hold at least one number, got none");
  const double* t = knots.data();
  for (int64_t i = 1; i < knots.size(); ++i) {
    if (t[i] > t[i - 1]) continue;
    refuse("knots", "be strictly increasing, got knots[" + std::to_string(i - 1) + "] = " +
                        text(t[i - 1]) + " and knots[" + std::to_string(i) + "] = " + text(t[i]));
  }
}

static void check_weights(const Array& weights, const Array& knots) {
  check_vector("weights", weights);
  if (weights.size() != knots.size()) {
    refuse("weights", "have the shape of the knots, (" + std::to_string(knots.size()) +
                          ",), got (" + std::to_string(weights.size()) + ",)");
  }
  const double least = *std::min_element(weights.data(), weights.data() + weights.size());
  if (!(least > 0)) refuse("weights", "be positive, got " + text(least));
}

[[noreturn]] static void refuse_scale(const Array& knots, const Array& points, double smoothing,
                                      const std::optional<Array>& weights) {
  const double* t = knots.data();
  double least = std::numeric_limits<double>::infinity(), largest = 0, farthest = 0;
  for (int64_t i = 1; i < knots.size(); ++i) {
    least = std::min(least, t[i] - t[i - 1]);
    largest = std::max(largest, t[i] - t[i - 1]);
  }
  for (int64_t j = 0; j < points.size(); ++j) {
    farthest = std::max(farthest, std::abs(points.data()[j] - t[0]));
  }
  char got[192];
  int size = std::snprintf(got, sizeof got,
                           "gaps of %.1e to %.1e, points %.1e from the first knot, smoothing %.1e",
                           least, largest, farthest, smoothing);
  if (weights) {
    const auto [low, high] =
        std::minmax_element(weights->data(), weights->data() + weights->size());
    std::snprintf(got + size, sizeof got - size, ", weights of %.1e to %.1e", *low, *high);
  }
  refuse("knots, points, smoothing and weights",
         std::string("be of a scale that float32 can plan, got ") + got);
}

// As spline_plan for one curve, from what a caller gives: everything but the kinds and the
// smoothing is validated here, where it costs nothing, and the coefficients are rounded to float32,
// too.
static py::tuple curve_plan(const Array& knots, const Array& points, double smoothing,
                            const std::optional<Array>& weights) {
  check_knots(knots);
  check_vector("points", points);
  const int64_t n = knots.size(), num_points = points.size();
  std::vector<double> penalties(n, static_cast<double>(n) * smoothing);
  if (weights) {
    check_weights(*weights, knots);
    for (int64_t i = 0; i < n; ++i) penalties[i] /= weights->data()[i];
  }
  const int64_t row = coded_torch::coefficients_size(n, num_points);
  py::array_t<double> coefficients({int64_t{1}, row});
  py::array_t<float> rounded({int64_t{1}, row});
  py::array_t<int32_t> schedule({int64_t{1}, coded_torch::schedule_size(n, num_points)});
  double* exact = coefficients.mutable_data();
  coded_torch::plan_spline(knots.data(), penalties.data(), n, points.data(), num_points, exact,
                           schedule.mutable_data());
  float* single = rounded.mutable_data();
  for (int64_t i = 0; i < row; ++i) single[i] = static_cast<float>(exact[i]);
  const bool finite = std::all_of(single, single + row, [](float c) { return std::isfinite(c); });
  if (!finite) refuse_scale(knots, points, smoothing, weights);
  return py::make_tuple(coefficients, rounded, schedule);
}

template <typename T>
static py::array_t<int64_t> short_path(const py::array_t<T, py::array::c_style>& distances) {
  if (distances.ndim() != 2 || distances.shape(0) != distances.shape(1)) {
    throw py::value_error("short_path: distances must be [B, B]");
  }
  const int64_t n = distances.shape(0);
  py::array_t<int64_t> order(n);
  const T* from = distances.data();
  int64_t* to = order.mutable_data();
  py::gil_scoped_release release;
  coded_torch::short_path(from, n, to);
  return order;
}

using Indices = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Of each of `size` rows, its first result, by place, or -1: the received workers' results are side
// by side, and worker n has computed rows[n], [N, G].
static py::array_t<int64_t> first_results(const Indices& rows, const Indices& received,
                                          int64_t size) {
  if (rows.ndim() != 2) throw py::value_error("first_results: rows must be [N, G]");
  const int64_t groups = rows.shape(1);
  py::array_t<int64_t> source(size);
  int64_t* to = source.mutable_data();
  std::fill_n(to, size, int64_t{-1});
  for (int64_t i = 0; i < received.size(); ++i) {
    const int64_t worker = received.data()[i];
    if (worker < 0 || worker >= rows.shape(0)) {
      throw py::index_error("received must lie in 0.." + std::to_string(rows.shape(0) - 1) +
                            ", got " + std::to_string(worker));
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = rows.data()[worker * groups + g];
      if (row < 0 || row >= size) throw py::index_error("first_results: rows must lie in [0, B)");
      int64_t& own = to[row];
      if (own < 0) own = i * groups + g;
    }
  }
  return source;
}

// Of rows [b] of a batch, given the place of each row's result, or -1, and which rows are far from
// all others: the places in `rows` of rows that estimate others, unless all of these are far, and
// of rows without a result; then the latter rows, and the results of the first.
static py::tuple split_rows(const Indices& source, const Indices& rows,
                            const py::array_t<bool, py::array::c_style>& far) {
  if (far.size() != rows.size()) throw py::value_error("split_rows: rows and far must be [b]");
  std::vector<int64_t> near, all, missing, missing_rows, used;
  for (int64_t i = 0; i < rows.size(); ++i) {
    const int64_t row = rows.data()[i];
    if (row < 0 || row >= source.size())
      throw py::index_error("split_rows: rows must be in 0..B-1");
    if (source.data()[row] < 0) {
      missing.push_back(i);
      missing_rows.push_back(row);
      continue;
    }
    all.push_back(i);
    if (!far.data()[i]) near.push_back(i);
  }
  const std::vector<int64_t>& known = near.empty() ? all : near;
  for (const int64_t i : known) used.push_back(source.data()[rows.data()[i]]);
  const auto array = [](const std::vector<int64_t>& numbers) {
    return py::array_t<int64_t>(static_cast<py::ssize_t>(numbers.size()), numbers.data());
  };
  return py::make_tuple(array(known), array(missing), array(missing_rows), array(used));
}

// The points of N workers, groups of K inputs with their copies, [G, N]: an order [B], which is cut
// into groups, the last of which may have fewer inputs, and errors [B]. Each copy goes where it
// lowers the expected squared error most, the probability that all copies are missing, times the
// error. It is convex in the copies, so greedy is best.
static py::array_t<int64_t> with_copies(const Indices& order, const Array& errors, int64_t num_data,
                                        int64_t num_workers, int64_t num_stragglers) {
  const int64_t size = order.size(), k = num_data, n = num_workers;
  if (k < 1 || n < k || errors.size() != size) {
    throw py::value_error("with_copies: order and errors must be [B], for N >= K workers");
  }
  for (int64_t i = 0; i < size; ++i) {
    if (order.data()[i] < 0 || order.data()[i] >= size) {
      throw py::index_error("with_copies: order must lie in [0, B)");
    }
  }
  const int64_t groups = (size + k - 1) / k;
  // By each further copy, the probability falls that all are among the S lost of N workers.
  std::vector<double> gain(n);
  double lost = 1;
  for (int64_t c = 0; c < n; ++c) {
    const double next = lost * (static_cast<double>(std::max(num_stragglers - c, int64_t{0})) /
                                static_cast<double>(n - c));
    gain[c] = lost - next;
    lost = next;
  }
  py::array_t<int64_t> points({groups, n});
  int64_t* to = points.mutable_data();
  std::vector<std::pair<double, int64_t>> scores;
  std::vector<int64_t> copies;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t own = std::min(k, size - g * k), spare = n - own;
    const int64_t* from = order.data() + g * k;
    scores.clear();
    for (int64_t c = 1; c <= spare; ++c) {  // between equals, the one with fewer copies
      for (int64_t i = 0; i < own; ++i) {
        const double score = gain[c] * errors.data()[from[i]] - 1e-12 * static_cast<double>(c);
        scores.emplace_back(std::isnan(score) ? std::numeric_limits<double>::infinity() : -score,
                            (c - 1) * own + i);
      }
    }
    std::partial_sort(scores.begin(), scores.begin() + spare, scores.end());
    copies.assign(own, 1);
    for (int64_t c = 0; c < spare; ++c) ++copies[scores[c].second % own];
    for (int64_t i = 0; i < own; ++i) to = std::fill_n(to, copies[i], from[i]);
  }
  return points;
}

// The rows of each part: of any `parts` rows in turn, each part gets one. The first go in order,
// the others as Python's random.Random.shuffle orders them, whose Mersenne Twister has this state:
// 624 words, all of which have been used.
static py::list deal(const py::array_t<uint32_t, py::array::c_style>& state, int64_t size,
                     int64_t parts) {
  constexpr size_t kWords = 624, kMiddle = 397;
  if (state.size() != kWords + 1 || state.data()[kWords] != kWords || parts < 1 || size < parts) {
    throw py::value_error("deal: state must be as it was seeded, and 1 <= parts <= size");
  }
  std::vector<uint32_t> words(state.data(), state.data() + kWords);
  size_t used = kWords;
  const auto next = [&words, &used] {
    if (used == kWords) {
      for (size_t i = 0; i < kWords; ++i) {
        const uint32_t mixed = (words[i] & 0x80000000u) | (words[(i + 1) % kWords] & 0x7FFFFFFFu);
        words[i] = words[(i + kMiddle) % kWords] ^ (mixed >> 1) ^ (mixed % 2 ? 0x9908B0DFu : 0u);
      }
      used = 0;
    }
    uint32_t word = words[used++];
    word ^= word >> 11;
    word ^= (word << 7) & 0x9D2C5680u;
    word ^= (word << 15) & 0xEFC60000u;
    return word ^ (word >> 18);
  };
  py::list hands;
  std::vector<int64_t*> ends;
  for (int64_t hand = 0; hand < parts; ++hand) {
    py::array_t<int64_t> rows(size / parts + (hand < size % parts));
    ends.push_back(rows.mutable_data());
    hands.append(std::move(rows));
  }
  std::vector<int64_t> turn(parts);
  for (int64_t start = 0; start < size; start += parts) {
    const int64_t count = std::min(parts, size - start);
    std::iota(turn.begin(), turn.begin() + count, start);
    for (int64_t last = count - 1; last > 0 && start > 0; --last) {
      int bits = 0;
      while ((last + 1) >> bits) ++bits;
      int64_t other;
      do other = next() >> (32 - bits);
      while (other > last);
      std::swap(turn[last], turn[other]);
    }
    for (int64_t hand = 0; hand < count; ++hand) *ends[hand]++ = turn[hand];
  }
  return hands;
}

// Samples of memory, by which a change of weights is seen that nothing counts: four runs of a cache
// line of each range, or all of a short one. Each call reads them again; whoever makes it keeps the
// memory alive.
class Samples {
 public:
  explicit Samples(std::vector<std::pair<uintptr_t, size_t>> ranges) : ranges_(std::move(ranges)) {}

  uint64_t hash() const {
    uint64_t state = 0;
    for (const auto& [address, size] : ranges_) {
      const char* begin = reinterpret_cast<const char*>(address);
      if (size <= kRuns * kRun) {
        state = read(state, begin, size);
        continue;
      }
      for (size_t i = 0; i < kRuns; ++i) {
        const size_t offset = (size - kRun) / (kRuns - 1) * i;
        state = read(state, begin + (i + 1 < kRuns ? offset / kRun * kRun : size - kRun), kRun);
      }
    }
    return state;
  }

 private:
  static constexpr size_t kRun = 64, kRuns = 4;

  // Every step is invertible, so that one word that differs gives another state.
  static uint64_t read(uint64_t state, const char* from, size_t size) {
    while (size > 0) {
      uint64_t word = 0;
      const size_t bytes = std::min(size, sizeof word);
      std::memcpy(&word, from, bytes);
      state = (state ^ word) * 0x9E3779B97F4A7C15u;
      state ^= state >> 32;
      from += bytes;
      size -= bytes;
    }
    return state;
  }

  std::vector<std::pair<uintptr_t, size_t>> ranges_;
};

// A tensor as DLPack's exchange of tensors tells it, in the binary form of DLPack 1.
struct TensorView {
  void* data;
  int32_t device[2];
  int32_t dims;
  uint8_t dtype[4];
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct TensorExchange {
  uint32_t major, minor;
  void* previous;
  void* others[3];
  int (*view)(void* tensor, TensorView* view);  // not 0, with an exception, if there is no view
};

// What the attributes of modules were, by identity, so that a second look finds in microseconds
// that nothing has changed. Immutable values are held. Other objects are known by weak references,
// because a look that held them would keep alive the modules to which they lead.
class Look {
 public:
  // The parts of a module, the names of attributes that are compared whole, the types of immutable
  // values and of tensors, and the number of elements of other collections that are compared.
  Look(const py::list& parts, const py::frozenset& whole, const py::frozenset& plain,
       const py::frozenset& tensors, size_t most)
      : whole_(whole), plain_(plain), tensors_(tensors), most_(most) {
    // Without it, which torch has since 2.10, attributes are read one by one in twice the time.
    for (const py::handle type : tensors) {
      const py::object exchange = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
      if (!PyCapsule_IsValid(exchange.ptr(), kExchange)) continue;
      exchange_ =
          static_cast<const TensorExchange*>(PyCapsule_GetPointer(exchange.ptr(), kExchange));
      if (exchange_->major != 1) exchange_ = nullptr;
    }
    for (const py::handle part : parts) {
      parts_.push_back({py::weakref(part), py::type::of(part), dict_of(part.attr("__dict__"), -1)});
    }
  }

  bool same() const {
    for (const Module& part : parts_) {
      const py::object now = called(part.reference);
      if (Py_TYPE(now.ptr()) != reinterpret_cast<PyTypeObject*>(part.type.ptr())) return false;
      static PyObject* const kDict = PyUnicode_InternFromString("__dict__");
      const auto attributes = owned(PyObject_GetAttr(now.ptr(), kDict));
      if (!is_same(part.attributes, attributes)) return false;
    }
    return true;
  }

 private:
  enum class Kind { kValue, kReference, kTensor, kSequence, kDict, kMethod };

  struct TensorState {
    std::vector<py::object> attributes;
    std::vector<int64_t> view;  // empty if all attributes are compared instead
  };

  struct Node {  // a cache line: the whole of a large module is read in each call
    Kind kind = Kind::kValue;
    py::object object;     // the value, a weak reference, or the type of what is looked into
    py::object name = {};  // its key in a dict
    std::vector<Node> children = {};
    size_t size = 0;  // of a collection; of a tensor, the attributes that are compared
    std::unique_ptr<TensorState> state = {};
  };

  struct Module {
    py::object reference, type;
    Node attributes;
  };

  static constexpr int kDeepest = 8;
  static constexpr size_t kMostNodes = size_t{1} << 18;  // some 20 MB; collections may share others

  [[noreturn]] static void refuse() { throw py::type_error("such an attribute is not compared"); }

  static py::object owned(PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
  }

  static py::object called(const py::object& reference) {
    return owned(PyObject_CallNoArgs(reference.ptr()));
  }

  static bool contains(const py::frozenset& types, py::handle value) {
    return types.contains(py::type::of(value));
  }

  Node node_of(py::handle value, int depth, bool whole = false) {
    if (depth > kDeepest || ++num_nodes_ > kMostNodes) refuse();
    if (contains(plain_, value)) return {Kind::kValue, py::reinterpret_borrow<py::object>(value)};
    if (contains(tensors_, value)) return tensor_of(value);
    if (PyMethod_Check(value.ptr())) {
      Node node{Kind::kMethod, py::type::of(value)};
      node.children.push_back(node_of(PyMethod_GET_FUNCTION(value.ptr()), depth + 1));
      node.children.push_back(node_of(PyMethod_GET_SELF(value.ptr()), depth + 1));
      return node;
    }
    if (PyDict_Check(value.ptr())) {
      const bool has_own_order = !PyDict_CheckExact(value.ptr()) && PyDict_Size(value.ptr()) > 0;
      if (has_own_order) refuse();
      return dict_of(py::reinterpret_borrow<py::object>(value), depth, whole);
    }
    if (PyList_Check(value.ptr()) || PyTuple_Check(value.ptr())) {
      Node node{Kind::kSequence, py::type::of(value)};
      node.size = size_t(PySequence_Fast_GET_SIZE(value.ptr()));
      for (size_t i = 0; i < std::min(node.size, most_); ++i) {
        node.children.push_back(node_of(PySequence_Fast_GET_ITEM(value.ptr(), i), depth + 1));
      }
      return node;
    }
    return {Kind::kReference, py::weakref(value)};  // a type_error for some types
  }

  Node dict_of(const py::object& dict, int depth, bool whole = true) {
    Node node{Kind::kDict, py::type::of(dict)};
    node.size = size_t(PyDict_Size(dict.ptr()));
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(dict.ptr(), &at, &key, &value)) {
      if (!whole && node.children.size() == most_) break;
      const auto name = py::reinterpret_borrow<py::object>(key);
      if (!contains(plain_, name)) refuse();
      node.children.push_back(node_of(value, depth + 1, depth < 0 && whole_.contains(name)));
      node.children.back().name = name;
    }
    return node;
  }

  // No weak reference to it: torch.utils.swap_tensors refuses tensors that have some. Another
  // tensor in the same state, of the same memory, is as good.
  Node tensor_of(py::handle tensor) const {
    if (!py::str(tensor.attr("layout")).equal(py::str("torch.strided"))) refuse();
    Node node{Kind::kTensor, py::type::of(tensor)};
    tensor.attr("data_ptr")();  // an exception if it has no memory
    const std::optional<TensorView> view = view_of(tensor);
    if (!view) PyErr_Clear();
    node.size = view ? 2 : 6;
    node.size += tensor.attr("is_complex")().cast<bool>();
    node.state = std::make_unique<TensorState>();
    with_attributes(tensor, node.size, [&state = *node.state](py::object found) {
      state.attributes.push_back(std::move(found));
      return true;
    });
    if (view) {
      with_numbers(*view, [&state = *node.state](int64_t number) {
        state.view.push_back(number);
        return true;
      });
    }
    return node;
  }

  // Call a function with the attributes of a tensor until it returns false, and return whether it
  // never did: two that DLPack does not tell, four others, and for complex numbers one more.
  template <typename Function>
  static bool with_attributes(py::handle tensor, size_t count, Function function) {
    static PyObject* const kVersion = PyUnicode_InternFromString("_version");
    static PyObject* const kIsNegative = PyUnicode_InternFromString("is_neg");
    static PyObject* const kIsConjugate = PyUnicode_InternFromString("is_conj");
    const auto method = [tensor](PyObject* name) {
      return owned(PyObject_CallMethodNoArgs(tensor.ptr(), name));
    };
    if (!function(owned(PyObject_GetAttr(tensor.ptr(), kVersion)))) return false;
    if (!function(method(kIsNegative))) return false;
    if (count % 2 == 1 && !function(method(kIsConjugate))) return false;
    if (count < 6) return true;
    return function(tensor.attr("dtype")) && function(tensor.attr("shape")) &&
           function(tensor.attr("data_ptr")()) && function(tensor.attr("stride")());
  }

  // Nothing if there is no view, perhaps with an exception.
  std::optional<TensorView> view_of(py::handle tensor) const {
    TensorView view;
    if (exchange_ == nullptr || exchange_->view(tensor.ptr(), &view) != 0) return std::nullopt;
    return view;
  }

  // Call a function with the numbers of a view until it returns false, and return whether it never
  // did.
  template <typename Function>
  static bool with_numbers(const TensorView& view, Function function) {
    int32_t dtype;
    std::memcpy(&dtype, view.dtype, sizeof dtype);
    const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data));
    for (const int64_t number :
         {address, int64_t(view.byte_offset), int64_t(dtype), int64_t(view.device[0]),
          int64_t(view.device[1]), int64_t(view.dims)}) {
      if (!function(number)) return false;
    }
    for (int32_t i = 0; i < view.dims; ++i) {
      if (!function(view.shape[i]) || !function(view.strides[i])) return false;
    }
    return true;
  }

  bool is_same_tensor(const Node& node, py::handle now) const {
    const TensorState& state = *node.state;
    size_t place = 0;
    const bool is_same = with_attributes(now, node.size, [&](const py::object& found) {
      return found.equal(state.attributes[place++]);
    });
    if (!is_same || state.view.empty()) return is_same;
    const std::optional<TensorView> view = view_of(now);
    if (!view) throw py::error_already_set();
    place = 0;
    return with_numbers(*view, [&](int64_t number) {
      return place < state.view.size() && number == state.view[place++];
    });
  }

  bool is_same(const Node& node, py::handle now) const {
    if (node.kind == Kind::kValue) return node.object.is(now);
    if (node.kind == Kind::kReference) return called(node.object).is(now);
    if (Py_TYPE(now.ptr()) != reinterpret_cast<PyTypeObject*>(node.object.ptr())) return false;
    if (node.kind == Kind::kTensor) return is_same_tensor(node, now);
    if (node.kind == Kind::kMethod) {
      return is_same(node.children[0], PyMethod_GET_FUNCTION(now.ptr())) &&
             is_same(node.children[1], PyMethod_GET_SELF(now.ptr()));
    }
    if (node.kind == Kind::kSequence) {
      if (size_t(PySequence_Fast_GET_SIZE(now.ptr())) != node.size) return false;
      for (size_t i = 0; i < node.children.size(); ++i) {
        if (i >= size_t(PySequence_Fast_GET_SIZE(now.ptr()))) return false;
        // Operators of tensors let other threads run, which may change the collection.
        const auto held =
            py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(now.ptr(), i));
        if (!is_same(node.children[i], held)) return false;
      }
      return true;
    }
    if (size_t(PyDict_Size(now.ptr())) != node.size) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (size_t i = 0; i < node.children.size(); ++i) {
      if (!PyDict_Next(now.ptr(), &at, &key, &value)) return false;
      const Node& child = node.children[i];
      if (child.name.ptr() != key) return false;
      if (child.kind == Kind::kValue) {
        if (child.object.ptr() != value) return false;
        continue;
      }
      const auto held = py::reinterpret_borrow<py::object>(value);
      if (!is_same(child, held)) return false;
    }
    return true;
  }

  static constexpr const char* kExchange = "dlpack_exchange_api";

  py::frozenset whole_, plain_, tensors_;
  const TensorExchange* exchange_ = nullptr;
  size_t most_;
  size_t num_nodes_ = 0;
  std::vector<Module> parts_;
};

PYBIND11_MODULE(_plan, m) {
  m.doc() = "Plans of smoothing splines and paths through points, on the host.";
  m.def(
      "spline_plan", &spline_plan, py::arg("knots"), py::arg("penalties"), py::arg("points"),
      "Coefficients [P, 12 n + 4 N] and schedule [P, n + 1 + N] of P splines: knots [P, n],\n"
      "penalties [P, n] (weights of integral g''^2 against each squared residual), points [P, N].\n"
      "Layout: csrc/math/spline_layout.h.");
  m.def(
      "curve_plan", &curve_plan, py::arg("knots"), py::arg("points"), py::arg("smoothing"),
      py::arg("weights"),
      "Coefficients [1, 12 n + 4 N] in float64, the same in float32, and schedule [1, n + 1 + N]\n"
      "of a smoothing spline; ValueError for what SplineMap does not allow.");
  m.def("first_results", &first_results, py::arg("rows"), py::arg("received"), py::arg("size"),
        "First result [B] of each row, or -1: rows [N, G] of workers, some of which are received.");
  m.def("split_rows", &split_rows, py::arg("source"), py::arg("rows"), py::arg("far"),
        "Places of known and of missing rows, the missing rows, and the results of the known.");
  m.def("with_copies", &with_copies, py::arg("order"), py::arg("errors"), py::arg("num_data"),
        py::arg("num_workers"), py::arg("num_stragglers"),
        "Inputs [G, N] of N workers: an order [B], the inputs with the largest errors repeated.");
  m.def("deal", &deal, py::arg("state"), py::arg("size"), py::arg("parts"),
        "Rows of each part: of any parts rows in turn, each gets one, at random.");
  py::class_<Samples>(m, "Samples", "Samples of memory: ranges of an address and bytes.")
      .def(py::init<std::vector<std::pair<uintptr_t, size_t>>>(), py::arg("ranges"))
      .def("hash", &Samples::hash, "A number that differs if a sample does.");
  py::class_<Look>(m, "Look", "What the attributes of the parts of a module were, by identity.")
      .def(py::init<py::list, py::frozenset, py::frozenset, py::frozenset, size_t>(),
           py::arg("parts"), py::arg("whole"), py::arg("plain"), py::arg("tensors"),
           py::arg("most"), "A TypeError for attributes that are not compared.")
      .def("same", &Look::same, "Whether they are the same, with tensors in the same state.");
  const char* doc =
      "Order [B] of B points along a short open path: distances [B, B], float32 or float64,\n"
      "C-contiguous. How: csrc/math/short_path.h.";
  m.def("short_path", &short_path<float>, py::arg("distances").noconvert(), doc);
  m.def("short_path", &short_path<double>, py::arg("distances").noconvert(), doc);
}
