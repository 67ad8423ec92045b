// coded_torch._plan: spline plans and paths, numpy arrays in and out. No torch header here:
// pybind11 and the stable ABI do not mix in one translation unit.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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

PYBIND11_MODULE(_plan, m) {
  m.doc() = "Plans of smoothing splines and paths through points, on the host.";
  m.def(
      "spline_plan", &spline_plan, py::arg("knots"), py::arg("penalties"), py::arg("points"),
      "Coefficients [P, 12 n + 4 N] and schedule [P, n + 1 + N] of P splines: knots [P, n],\n"
      "penalties [P, n] (weights of integral g''^2 against each squared residual), points [P, N].\n"
      "Layout: csrc/math/spline_plan.h.");
  const char* doc =
      "Order [B] of B points along a short open path: distances [B, B], float32 or float64,\n"
      "C-contiguous. How: csrc/math/short_path.h.";
  m.def("short_path", &short_path<float>, py::arg("distances").noconvert(), doc);
  m.def("short_path", &short_path<double>, py::arg("distances").noconvert(), doc);
}
