// From tensors to MaternArgs and MaternAmongArgs: the checks that both backends share.
#pragma once

#include "checks.h"
#include "matern_args.h"

namespace coded_torch {

inline void check_matern(const char* op, const Tensor& squared) {
  const ScalarType dtype = squared.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float, op,
                  ": squared_distances must be float64 or float32, got ",
                  torch::headeronly::toString(dtype));
}

inline MaternArgs matern_args(const Tensor& squared, double scale, const Tensor& out) {
  const ScalarType dtype = squared.scalar_type();
  check_matern("matern52_out", squared);
  bool same =
      out.dim() == squared.dim() && out.scalar_type() == dtype && out.device() == squared.device();
  for (int64_t i = 0; same && i < out.dim(); ++i) same = out.size(i) == squared.size(i);
  STD_TORCH_CHECK(same,
                  "matern52_out: out must have the shape, the dtype and the device of the squared "
                  "distances, got ",
                  torch::headeronly::toString(out.scalar_type()), " ", shape_str(out), " for ",
                  torch::headeronly::toString(dtype), " ", shape_str(squared));
  STD_TORCH_CHECK(squared.is_contiguous() && out.is_contiguous(),
                  "matern52_out: squared_distances and out must be contiguous");
  const Span from = span_of(squared), to = span_of(out);
  STD_TORCH_CHECK(
      from.begin == to.begin || to.end <= from.begin || from.end <= to.begin,
      "matern52_out: out must be the memory of the squared distances, or apart from it");
  return {squared.const_data_ptr(), out.mutable_data_ptr(), squared.numel(), scale};
}

// A call ready to launch: the tensor for the result, and what the kernels need to know. What the
// indices hold, only the CPU operator looks at.
struct MaternAmongCall {
  Tensor out;
  MaternAmongArgs args;
};

inline MaternAmongCall prepare_among(const Tensor& squared, const Tensor& rows,
                                     const Tensor& columns, double scale) {
  check_matern("matern52_among", squared);
  STD_TORCH_CHECK(squared.dim() == 2 && squared.is_contiguous(),
                  "matern52_among: squared_distances must be a contiguous matrix, got ",
                  shape_str(squared));
  for (const Tensor& index : {rows, columns}) {
    STD_TORCH_CHECK(index.dim() == 1 && index.is_contiguous() &&
                        index.scalar_type() == ScalarType::Long &&
                        index.device() == squared.device(),
                    "matern52_among: rows and columns must be contiguous int64 vectors on the "
                    "device of the squared distances, got ",
                    torch::headeronly::toString(index.scalar_type()), " ", shape_str(index));
  }
  const Tensor out = torch::stable::empty({rows.size(0), columns.size(0)}, squared.scalar_type(),
                                          std::nullopt, squared.device());
  return {out,
          {squared.const_data_ptr(), squared.size(1),
           static_cast<const int64_t*>(rows.const_data_ptr()),
           static_cast<const int64_t*>(columns.const_data_ptr()), out.mutable_data_ptr(),
           rows.size(0), columns.size(0), scale}};
}

}  // namespace coded_torch
