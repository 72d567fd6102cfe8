#include "cpu/kernels/multiply.h"

#include "common/scalar.h"

namespace fastdni::cpu {
namespace {

constexpr Isa kIsa = Isa::FASTDNI_ISA;

template <class T>
struct Vectors {
  static constexpr int kLanes = vector_bytes(kIsa) / sizeof(T);
  typedef T Type __attribute__((vector_size(vector_bytes(kIsa))));

  static inline __attribute__((always_inline)) Type load(const T* from) {
    Type vector;
    __builtin_memcpy(&vector, from, sizeof vector);  // one load, aligned or not
    return vector;
  }
  static inline __attribute__((always_inline)) void store(const Type& vector, T* to) {
    __builtin_memcpy(to, &vector, sizeof vector);
  }
};

template <class T>
inline __attribute__((always_inline)) T round_to_bfloat16(T value) {
  return static_cast<T>(static_cast<float>(bfloat16(static_cast<float>(value))));
}

// kRows rows of c in one panel, kept in registers over all of k.
template <int kRows, class T>
inline __attribute__((always_inline)) void tile(const Strided<T>& a, const T* __restrict__ b,
                                                int64_t k, bool add, T* __restrict__ c,
                                                int64_t c_stride) {
  using Vector = typename Vectors<T>::Type;
  constexpr int kLanes = Vectors<T>::kLanes;
  const int64_t row = a.row, column = a.column;
  const T* __restrict__ from = a.data;
  Vector sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Vector{};
  for (int64_t i = 0; i < k; ++i) {
    const Vector left = Vectors<T>::load(b);
    const Vector right = Vectors<T>::load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const T factor = from[r * row];
      sums[r][0] += factor * left;
      sums[r][1] += factor * right;
    }
    from += column;
    b += 2 * kLanes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    T* out = c + r * c_stride;
    if (add) {
      sums[r][0] += Vectors<T>::load(out);
      sums[r][1] += Vectors<T>::load(out + kLanes);
    }
    Vectors<T>::store(sums[r][0], out);
    Vectors<T>::store(sums[r][1], out + kLanes);
  }
}

template <int kRows, class T>
void tile_of(int64_t rows, const Strided<T>& a, const T* b, int64_t k, bool add, T* c,
             int64_t c_stride) {
  if (rows == kRows) {
    tile<kRows>(a, b, k, add, c, c_stride);
  } else if constexpr (kRows > 1) {
    tile_of<kRows - 1>(rows, a, b, k, add, c, c_stride);
  }
}

// What one pass over k takes of b stays in the first-level cache: 16 KiB for AVX2.
constexpr int64_t kDepth = 256;
constexpr int64_t kWorthCopying = 64;

// A square block whose rows and columns change places in registers. 16 bytes wide for every
// instruction set: wider blocks need shuffles across lanes, which cost more than they save.
template <class T>
struct Block {
  static constexpr int kSide = 16 / sizeof(T);
  typedef T Row __attribute__((vector_size(16)));

  static inline __attribute__((always_inline)) void transpose(const T* from, int64_t stride, T* to,
                                                              int64_t to_stride) {
    Row rows[kSide];
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) __builtin_memcpy(&rows[i], from + i * stride, sizeof(Row));
    if constexpr (kSide == 4) {
      const Row a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
      const Row b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
      const Row c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
      const Row d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
      rows[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
      rows[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
      rows[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
      rows[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
    } else {
      const Row a = __builtin_shufflevector(rows[0], rows[1], 0, 2);
      rows[1] = __builtin_shufflevector(rows[0], rows[1], 1, 3);
      rows[0] = a;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) __builtin_memcpy(to + i * to_stride, &rows[i], sizeof(Row));
  }
};

}  // namespace

template <Isa isa, class T>
void pack(const Strided<T>& b, int64_t k, int64_t n, int64_t first, int64_t last, bool rounded,
          T* packed) {
  constexpr int64_t kWidth = kPanelWidth<isa, T>, kSide = Block<T>::kSide;
  if (b.column == 1) {
    return pack_rows<isa, T>(b.data, b.row, k, n, first, last, 0, k, rounded, packed);
  }
  for (int64_t p = first; p < last; ++p) {
    T* __restrict__ out = packed + p * kWidth * k;
    const int64_t begin = p * kWidth, columns = n - begin < kWidth ? n - begin : kWidth;
    const int64_t whole_rows = b.row == 1 ? k / kSide * kSide : 0;
    const int64_t whole_columns = columns / kSide * kSide;
    // A weight that is read transposed, block by block; then what is left over.
    for (int64_t i = 0; i < whole_rows; i += kSide) {
      for (int64_t j = 0; j < whole_columns; j += kSide) {
        Block<T>::transpose(b.data + i + (begin + j) * b.column, b.column, out + i * kWidth + j,
                            kWidth);
      }
    }
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = i < whole_rows ? whole_columns : 0; j < kWidth; ++j) {
        out[i * kWidth + j] = j < columns ? b.data[i * b.row + (begin + j) * b.column] : T(0);
      }
    }
    if (rounded) {
#pragma omp simd
      for (int64_t i = 0; i < k * kWidth; ++i) out[i] = round_to_bfloat16(out[i]);
    }
  }
}

template <Isa isa, class T>
void pack_rows(const T* b, int64_t stride, int64_t k, int64_t n, int64_t first, int64_t last,
               int64_t begin, int64_t end, bool rounded, T* packed) {
  constexpr int64_t kWidth = kPanelWidth<isa, T>;
  for (int64_t p = first; p < last; ++p) {
    const int64_t columns = n - p * kWidth < kWidth ? n - p * kWidth : kWidth;
    for (int64_t i = begin; i < end; ++i) {
      const T* __restrict__ from = b + i * stride + p * kWidth;
      T* __restrict__ out = packed + (p * k + i) * kWidth;
      if (columns == kWidth) {
        __builtin_memcpy(out, from, kWidth * sizeof(T));
      } else {
        for (int64_t j = 0; j < kWidth; ++j) out[j] = j < columns ? from[j] : T(0);
      }
      if (rounded) {
#pragma omp simd
        for (int64_t j = 0; j < kWidth; ++j) out[j] = round_to_bfloat16(out[j]);
      }
    }
  }
}

namespace {

// Rows of a that lie near each other: tile t's rows r and depths i at (t kDepth + i) kTileRows + r.
// A transposed a has its rows in columns that share few lines of the cache: read once, not once a
// panel. Copied in whole vectors, each of which writes over what the last one had too much.
template <Isa isa, class T>
struct TileCopies {
  static constexpr int64_t kRows = kTileRows<isa>, kLanes = Vectors<T>::kLanes;
  static constexpr int64_t kCopied = (kRows + kLanes - 1) / kLanes * kLanes;
  T data[(kMultiplyRows / kRows + 1) * kRows * kDepth + kLanes];

  T* of(int64_t tile) { return data + tile * kRows * kDepth; }

  void fill(int64_t tile, const Strided<T>& from, int64_t rows, int64_t depth, bool rounded) {
    T* to = of(tile);
    if (!rounded) {
      for (int64_t i = 0; i < depth; ++i) {
        __builtin_memcpy(to + i * kRows, from.data + i * from.column, kCopied * sizeof(T));
      }
      return;
    }
    for (int64_t i = 0; i < depth; ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        to[i * kRows + r] = round_to_bfloat16(from.data[r * from.row + i * from.column]);
      }
    }
  }
};

}  // namespace

template <Isa isa, class T>
void multiply(const Strided<T>& a, const T* packed, int64_t m, int64_t k, int64_t first,
              int64_t last, bool rounded, bool add, T* c, int64_t c_stride) {
  constexpr int64_t kWidth = kPanelWidth<isa, T>, kRows = kTileRows<isa>;
  const int64_t tiles = (m + kRows - 1) / kRows;
  // Tiles of like size: 10 rows are 5 + 5, not 6 + 4.
  const auto tile_begin = [=](int64_t t) { return m * t / tiles; };
  TileCopies<isa, T> copies;
  for (int64_t depth = 0; depth == 0 || depth < k; depth += kDepth) {
    const int64_t ks = k - depth < kDepth ? k - depth : kDepth;
    const bool copied = rounded || (a.row == 1 && ks >= kWorthCopying);
    for (int64_t t = 0; copied && t < tiles; ++t) {
      const int64_t begin = tile_begin(t), rows = tile_begin(t + 1) - begin;
      copies.fill(t, a.from(begin, depth), rows, ks, rounded);
    }
    // A panel's part stays in the first-level cache for all of the tiles.
    for (int64_t p = first; p < last; ++p) {
      const T* panel = packed + (p * k + depth) * kWidth;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = tile_begin(t), rows = tile_begin(t + 1) - begin;
        const Strided<T> from = copied ? Strided<T>{copies.of(t), 1, kRows} : a.from(begin, depth);
        tile_of<kRows>(rows, from, panel, ks, add || depth > 0,
                       c + begin * c_stride + (p - first) * kWidth, c_stride);
      }
    }
  }
}

#define INSTANTIATE(T)                                                                             \
  template void pack<kIsa, T>(const Strided<T>&, int64_t, int64_t, int64_t, int64_t, bool, T*);    \
  template void pack_rows<kIsa, T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                   int64_t, bool, T*);                                             \
  template void multiply<kIsa, T>(const Strided<T>&, const T*, int64_t, int64_t, int64_t, int64_t, \
                                  bool, bool, T*, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace fastdni::cpu
