// Matrix products of our own: small enough to be worth no library call, the same bits for any
// number of threads, and in pieces that other work can be fused to.
//
//   c (m, n) = a (m, k) b (k, n)
//
// b is first laid out in panels: panel p holds the columns [p W, (p + 1) W) of b, row after row,
// padded with zeros, so that the kernel reads it from front to back. a is read through strides,
// transposed or not. c is stored row by row with a stride of whole panels, so there are no edges.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace fastdni::cpu {

constexpr int vector_bytes(Isa isa) { return isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16; }

// Two vectors: with kTileRows rows the accumulators, a row of b and one element of a fill the
// registers.
template <Isa isa, class T>
constexpr int64_t kPanelWidth = 2 * vector_bytes(isa) / sizeof(T);

template <Isa isa>
constexpr int64_t kTileRows = isa == Isa::avx512 ? 12 : 6;

template <Isa isa, class T>
int64_t panels(int64_t columns) {
  return (columns + kPanelWidth<isa, T> - 1) / kPanelWidth<isa, T>;
}

// The stride of a matrix that can be a result.
template <Isa isa, class T>
int64_t padded(int64_t columns) {
  return panels<isa, T>(columns) * kPanelWidth<isa, T>;
}

// A matrix of which neither the rows nor the columns need be contiguous.
template <class T>
struct Strided {
  const T* data;
  int64_t row, column;  // strides in elements

  Strided from(int64_t r, int64_t c) const { return {data + r * row + c * column, row, column}; }
  Strided transposed() const { return {data, column, row}; }
};

template <class T>
Strided<T> row_major(const T* data, int64_t stride) {
  return {data, stride, 1};
}

// Writes the panels [first, last) of b (k, n). `rounded` rounds to bfloat16 on the way, as autocast
// wants the operands of products.
template <Isa isa, class T>
void pack(const Strided<T>& b, int64_t k, int64_t n, int64_t first, int64_t last, bool rounded,
          T* packed);

// Writes the rows [begin, end) of b (k, n), stored row by row, into the panels [first, last).
template <Isa isa, class T>
void pack_rows(const T* b, int64_t stride, int64_t k, int64_t n, int64_t first, int64_t last,
               int64_t begin, int64_t end, bool rounded, T* packed);

// c = a b, or c + a b, for `m` rows and the panels [first, last); c's first column is that of the
// panel `first`. At most kMultiplyRows rows at a time. Of a transposed a up to kOverread bytes
// behind its last element are read.
constexpr int64_t kMultiplyRows = 72;
constexpr int64_t kOverread = 64;
template <Isa isa, class T>
void multiply(const Strided<T>& a, const T* packed, int64_t m, int64_t k, int64_t first,
              int64_t last, bool rounded, bool add, T* c, int64_t c_stride);

}  // namespace fastdni::cpu
