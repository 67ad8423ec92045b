// Products, factors and solutions of matrices on the CPU, by the operators of the torch that runs.
// They are made of blocks of rows that do not depend on the number of threads, each by one thread,
// so neither do their bits.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <array>

#include "../checks.h"

namespace coded_torch {

// A contiguous tensor of at most three dimensions. The dispatcher, which finds an operator by its
// name in every call, would take as long as a small product.
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 3> strides{};
  int64_t count = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides.at(dim) = count;
    count *= std::max<int64_t>(sizes.begin()[dim], 1);
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides.data(), static_cast<int32_t>(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// A view of a matrix.
inline Tensor viewed(const Tensor& matrix, std::array<int64_t, 2> sizes,
                     std::array<int64_t, 2> strides, int64_t first = 0) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), matrix.dim(), sizes.data(),
                                                        strides.data(), first, &made));
  return Tensor(made);
}

template <class T>
T* numbers(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor rows_of(const Tensor& matrix, int64_t first, int64_t count) {
  if (count == matrix.size(0)) return matrix;
  if (matrix.dim() == 1) return viewed(matrix, {count, 1}, {1, 1}, first);
  const int64_t stride = matrix.stride(0);
  return viewed(matrix, {count, matrix.size(1)}, {stride, matrix.stride(1)}, first * stride);
}

inline Tensor columns_of(const Tensor& matrix, int64_t first, int64_t count) {
  if (count == matrix.size(1)) return matrix;
  const int64_t stride = matrix.stride(1);
  return viewed(matrix, {matrix.size(0), count}, {matrix.stride(0), stride}, first * stride);
}

inline Tensor transposed(const Tensor& matrix) {
  return viewed(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

template <size_t kArguments>
void call_torch(const char* op, const char* overload, std::array<StableIValue, kArguments> stack,
                size_t num_results) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  for (size_t i = 0; i < num_results; ++i) torch::stable::detail::to<Tensor>(stack[i]);
}

// While it lives, MKL uses one thread for this thread's products. Other libraries do so anyway
// among threads, and have no such function.
class OneThread {
 public:
  OneThread() : before_(set_ ? set_(1) : 0) {}
  ~OneThread() {
    if (set_) set_(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  using Set = int (*)(int);
  inline static const Set set_ =
      reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
  int before_;
};

// Calls f(first, count) for blocks of rows, which threads share.
template <class F>
void for_blocks(int64_t num_rows, int64_t block, const F& f) {
  const int64_t blocks = (num_rows + block - 1) / block;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const OneThread one;
    for (int64_t b = begin; b < end; ++b) f(b * block, std::min(block, num_rows - b * block));
  });
}

constexpr int64_t kProductRows = 256;  // of a block; not tuned

// out [m, n] = a [m, k] b [k, n], of any strides with unit columns or rows.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  for_blocks(a.size(0), kProductRows, [&](int64_t first, int64_t count) {
    call_torch<3>("aten::mm", "out",
                  {from(rows_of(a, first, count)), from(b), from(rows_of(out, first, count))}, 1);
  });
}

inline Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = new_tensor({a.size(0), b.size(1)}, a.scalar_type());
  multiply(out, a, b);
  return out;
}

// Copies the lower triangle of a contiguous matrix to the upper one, a tile at a time.
template <class T>
void mirror(T* matrix, int64_t n) {
  constexpr int64_t kTile = 32;
  for_blocks(n, 8 * kTile, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i += kTile) {
      for (int64_t j = 0; j <= i; j += kTile) {
        for (int64_t a = i; a < std::min(first + count, i + kTile); ++a) {
          for (int64_t b = j; b < std::min(a, j + kTile); ++b)
            matrix[b * n + a] = matrix[a * n + b];
        }
      }
    }
  });
}

// The inner products of rows, [n, n]; the lower triangle and some of the upper one.
inline Tensor inner_products(const Tensor& rows) {
  using torch::stable::detail::from;
  const int64_t n = rows.size(0), block = n > 1500 ? 512 : 96;
  const Tensor out = new_tensor({n, n}, rows.scalar_type());
  for_blocks(n, block, [&](int64_t first, int64_t count) {
    const Tensor lower = columns_of(rows_of(out, first, count), 0, first + count);
    const Tensor others = transposed(rows_of(rows, 0, first + count));
    call_torch<3>("aten::mm", "out", {from(rows_of(rows, first, count)), from(others), from(lower)},
                  1);
  });
  return out;
}

// Turns a symmetric matrix into its factor L, by columns: matrix[j, i] is L[i, j]. False if it is
// not positive.
inline bool factorise(const Tensor& matrix) {
  using torch::stable::detail::from;
  const Tensor failed = new_tensor({}, ScalarType::Int);
  const Tensor out = transposed(matrix);
  for_blocks(1, 1, [&](int64_t, int64_t) {
    call_torch<5>("aten::linalg_cholesky_ex", "L",
                  {from(out), from(false), from(false), from(out), from(failed)}, 2);
  });
  return *numbers<int32_t>(failed) == 0;
}

// Rows of a block: 667 rows of 3,333 numbers take 1.6 times as long 64 at a time, and no less at
// once (measured once; no benchmark keeps it).
constexpr int64_t kSolvedRows = 256;

// Turns rows, contiguous, into rows L^-T, or with `back` into rows L^-1, of what factorise left.
inline void solve(const Tensor& rows, const Tensor& factor, bool back) {
  using torch::stable::detail::from;
  const Tensor triangle = back ? factor : transposed(factor);
  for_blocks(rows.size(0), kSolvedRows, [&](int64_t first, int64_t count) {
    const Tensor some = transposed(rows_of(rows, first, count));
    call_torch<6>("aten::linalg_solve_triangular", "out",
                  {from(triangle), from(some), from(back), from(true), from(false), from(some)}, 1);
  });
}

}  // namespace coded_torch
