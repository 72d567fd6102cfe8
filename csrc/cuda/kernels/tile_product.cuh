// A tile of a product, made by a block: kTileRows rows of `a` times kTileColumns columns of `b`.
//
// The depth is cut into chunks, which the block's warps take in turn. A warp works on memory of its
// own and waits for no other; what all of them have found is added at the end, in their order. So a
// tile has the same bits wherever it is made, and few rows keep a whole block at work.
#pragma once
#include "common/network.h"
#include "cuda/kernels/ptx.cuh"
#include "cuda/kernels/vector.cuh"

namespace fastdni::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;
// When it is done a thread has the columns lane, lane + kTileLanes, ... of one row.
constexpr int kTileLanes = kTileThreads / kTileRows;
constexpr int kTileResults = kTileColumns / kTileLanes;

// One side of a product: `wide` rows of a, or columns of b, `depth` long each.
template <class T>
struct Side {
  const T* data;
  int stride;        // from neighbour to neighbour in the other direction than memory's
  bool depth_first;  // neighbours in depth are neighbours in memory
  int wide;
  const int64_t* labels = nullptr;  // without data: one-hot vectors, one for each step in depth
};

template <Precision precision, class T>
class TileProduct {
 public:
  // What a product reads of an operand.
  static __device__ T operand(T value) {
    if constexpr (precision == Precision::bfloat16) {
      return static_cast<T>(static_cast<float>(bfloat16(static_cast<float>(value))));
    } else if constexpr (precision == Precision::tf32 && kTensorCores) {
      return to_tf32(value);
    } else {
      return value;
    }
  }

  // Adds rows [a_first, a_first + kTileRows) of a times columns [b_first, ...) of b. For all
  // threads of the block.
  __device__ void add(const Side<T>& a, int a_first, const Side<T>& b, int b_first, int depth) {
    T* a_chunk = memory() + threadIdx.x / 32 * kWarpElements;
    T* b_chunk = a_chunk + kDepth * kAStride;
    Quads<kTileRows> next_a;
    Quads<kTileColumns> next_b;
    bool loaded = false;
    for (int from = threadIdx.x / 32 * kDepth;; from += kWarps * kDepth) {
      const bool more = from < depth;
      if (more) {  // on its way while the chunk before is multiplied
        load(a, a_first, from, depth, next_a);
        load(b, b_first, from, depth, next_b);
      }
      if (loaded) {
        __syncwarp();  // the chunk is there for all lanes, and all lanes are together
        multiply(a_chunk, b_chunk);
      }
      if (!more) return;
      loaded = true;
      __syncwarp();
      store<kAStride>(a, next_a, a_chunk);
      store<kBStride>(b, next_b, b_chunk);
    }
  }

  // The sums of all warps. Of the tile's row threadIdx.x / kTileLanes the columns of this thread.
  __device__ void finish(T (&result)[kTileResults]) {
    const int warp = threadIdx.x / 32;
    const int row = threadIdx.x / kTileLanes, lane = threadIdx.x % kTileLanes;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      __syncwarp();
      deposit(pass, memory() + warp * kWarpElements);
      __syncthreads();
      if (row / kPassRows == pass) {
        const T* from = memory() + row % kPassRows * kSumStride + lane;
#pragma unroll
        for (int j = 0; j < kTileResults; ++j) {
          T sum = 0;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) sum += from[w * kWarpElements + j * kTileLanes];
          result[j] = sum;
        }
      }
      __syncthreads();
    }
  }

 private:
  static constexpr bool kTensorCores = precision != Precision::exact && sizeof(T) == sizeof(float);
  static constexpr int kWarps = kTileThreads / 32;
  // As much as fits in the 48 KB that a kernel may declare.
  static constexpr int kDepth = 64 / sizeof(T);
  static constexpr int kDepthQuads = kDepth / 4;
  // Lanes that read or write together meet different banks, or at most two of them one.
  static constexpr int kAStride = kTileRows + 4, kBStride = kTileColumns + 8;
  static constexpr int kWarpElements = kDepth * (kAStride + kBStride);
  // Sums are handed over in as many passes as they need memory for.
  static constexpr int kPasses = sizeof(T) / 4;
  static constexpr int kPassRows = kTileRows / kPasses;
  static constexpr int kSumStride = kTileColumns + 16;
  static_assert(kPassRows * kSumStride <= kWarpElements);
  // A lane's part of the tile: without tensor cores 4 rows, and 4 columns in either half.
  static constexpr int kSums = kTileRows * kTileColumns / 32;
  static constexpr int kLaneRows = 4, kLaneColumns = 8;

  static __device__ T* memory() {
    FASTDNI_SHARED(T, shared, kWarps * kWarpElements);
    return shared;
  }

  // A lane's part of a chunk, in fours that are neighbours in memory.
  template <int kWide>
  struct Quads {
    static constexpr int kCount = kWide * kDepth / 4 / 32;
    Vector<T, 4> values[kCount];
  };

  struct Place {
    int wide, depth;  // of a quad's first element
  };
  template <int kWide>
  static __device__ Place place(const Side<T>& side, int quad) {
    const int number = quad * 32 + threadIdx.x % 32;
    if (side.depth_first) return {number / kDepthQuads, number % kDepthQuads * 4};
    return {number % (kWide / 4) * 4, number / (kWide / 4)};
  }

  // Elements past either end are zero.
  template <int kWide>
  static __device__ void load(const Side<T>& side, int first, int from, int depth,
                              Quads<kWide>& quads) {
    if (side.labels != nullptr) return load_labels(side, first, from, depth, quads);
    constexpr int kCount = Quads<kWide>::kCount;
    const Place at = place<kWide>(side, 0);
    const int wide = first + at.wide, k = from + at.depth;
    // From quad to quad it goes on in the direction that is not memory's.
    const int further = side.depth_first ? 32 / kDepthQuads : 32 * 4 / kWide;
    const int64_t stride = side.stride, step = further * stride;
    const int along = side.depth_first ? depth - k : side.wide - wide;
    const int across = side.depth_first ? side.wide - wide : depth - k;
    const T* source =
        in_global_memory(side.data) + (side.depth_first ? wide * stride + k : k * stride + wide);
    if (along >= 4 && across > (kCount - 1) * further && side.stride % 4 == 0 &&
        is_vector_aligned(side.data)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        quads.values[i] = cuda::load<true, 4>(source + i * step, 0, 4);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      quads.values[i] =
          cuda::load<false, 4>(source + i * step, 0, across > i * further ? along : 0);
    }
  }

  template <int kWide>
  static __device__ void load_labels(const Side<T>& side, int first, int from, int depth,
                                     Quads<kWide>& quads) {
#pragma unroll
    for (int i = 0; i < Quads<kWide>::kCount; ++i) {
      const Place at = place<kWide>(side, i);
      const int64_t label = from + at.depth < depth ? side.labels[from + at.depth] : -1;
#pragma unroll
      for (int e = 0; e < 4; ++e) quads.values[i].values[e] = T(label == first + at.wide + e);
    }
  }

  // What is in depth at 4 q + e lies at e kDepthQuads + q: lanes then write to different banks. The
  // order is another, and the same on both sides.
  template <int kStride, int kWide>
  static __device__ void store(const Side<T>& side, const Quads<kWide>& quads, T* chunk) {
#pragma unroll
    for (int i = 0; i < Quads<kWide>::kCount; ++i) {
      const Place at = place<kWide>(side, i);
      Vector<T, 4> rounded;
#pragma unroll
      for (int e = 0; e < 4; ++e) rounded.values[e] = operand(quads.values[i].values[e]);
      if (side.depth_first) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          chunk[(e * kDepthQuads + at.depth / 4) * kStride + at.wide] = rounded.values[e];
        }
      } else {
        const int slot = at.depth % 4 * kDepthQuads + at.depth / 4;
        cuda::store<true>(chunk, slot * kStride + at.wide, 0, rounded);
      }
    }
  }

  __device__ void multiply(const T* a, const T* b) {
    if constexpr (!kTensorCores) {
      multiply_exact(a, b);
    } else if constexpr (precision == Precision::bfloat16) {
      multiply_bfloat16(a, b);
    } else {
      multiply_tf32(a, b);
    }
  }

  __device__ void multiply_exact(const T* a, const T* b) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1  // more would not stay in registers
    for (int k = 0; k < kDepth; ++k) {
      const auto rows = cuda::load<true, 4>(a, k * kAStride + lane / 8 * kLaneRows, 0);
      const T* from = b + k * kBStride;
      const Vector<T, 4> columns[2] = {
          cuda::load<true, 4>(from, lane % 8 * 4, 0),
          cuda::load<true, 4>(from, kTileColumns / 2 + lane % 8 * 4, 0)};
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) {
          sums_[i * kLaneColumns + j] += rows.values[i] * columns[j / 4].values[j % 4];
        }
      }
    }
  }

  // The fragments of multiply_add_tf32, from depth `k` on.
  static __device__ void fragment_a(const T* a, int k, float (&fragment)[4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = a[(k + t + i / 2 * 4) * kAStride + g + i % 2 * 8];
  }
  static __device__ void fragment_b(const T* b, int k, int column, float (&fragment)[2]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) fragment[i] = b[(k + t + i * 4) * kBStride + column + g];
  }

  template <int kCount>
  static __device__ void split(float (&large)[kCount], float (&small)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float rounded = to_tf32(large[i]);
      small[i] = to_tf32(large[i] - rounded);
      large[i] = rounded;
    }
  }

  __device__ void multiply_tf32(const T* a, const T* b) {
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 8) {
      float of_a[4], small_a[4];
      fragment_a(a, k, of_a);
      if constexpr (precision == Precision::tf32x3) split(of_a, small_a);
#pragma unroll
      for (int n = 0; n < kTileColumns / 8; ++n) {
        float of_b[2], small_b[2];
        fragment_b(b, k, n * 8, of_b);
        if constexpr (precision == Precision::tf32x3) {
          split(of_b, small_b);
          multiply_add_tf32(fragment(n), small_a, of_b);
          multiply_add_tf32(fragment(n), of_a, small_b);
        }
        multiply_add_tf32(fragment(n), of_a, of_b);
      }
    }
  }

  // A pair in depth is what lies 4 apart here: the order does not matter, as long as both sides
  // have the same.
  __device__ void multiply_bfloat16(const T* a, const T* b) {
    static_assert(!kTensorCores || kDepth == 16);
    float low_a[4], high_a[4];
    fragment_a(a, 0, low_a);
    fragment_a(a, 8, high_a);
    const uint32_t of_a[4] = {pack_bfloat16(low_a[0], low_a[2]), pack_bfloat16(low_a[1], low_a[3]),
                              pack_bfloat16(high_a[0], high_a[2]),
                              pack_bfloat16(high_a[1], high_a[3])};
#pragma unroll
    for (int n = 0; n < kTileColumns / 8; ++n) {
      float low_b[2], high_b[2];
      fragment_b(b, 0, n * 8, low_b);
      fragment_b(b, 8, n * 8, high_b);
      const uint32_t of_b[2] = {pack_bfloat16(low_b[0], low_b[1]),
                                pack_bfloat16(high_b[0], high_b[1])};
      multiply_add_bfloat16(fragment(n), of_a, of_b);
    }
  }

  // c of multiply_add_..., for the n-th eight columns.
  __device__ float (&fragment(int n))[4] { return *reinterpret_cast<float (*)[4]>(sums_ + n * 4); }

  // Writes this lane's sums of a pass's rows.
  __device__ void deposit(int pass, T* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      int row, column;
      if constexpr (kTensorCores) {
        row = lane / 4 + i % 4 / 2 * 8;
        column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      } else {
        const int j = i % kLaneColumns;
        row = lane / 8 * kLaneRows + i / kLaneColumns;
        column = j / 4 * (kTileColumns / 2) + lane % 8 * 4 + j % 4;
      }
      if (row / kPassRows == pass) to[row % kPassRows * kSumStride + column] = sums_[i];
    }
  }

  T sums_[kSums] = {};
};

// The tile of a product over any depth, of sides that are not depth_first: so many steps at a time.
// More additions in a row would lose more than a library's sums do.
constexpr int kDeepSteps = 4096;

template <Precision precision, class T>
__device__ void multiply_deep(Side<T> a, int a_first, Side<T> b, int b_first, int64_t depth,
                              T (&result)[kTileResults]) {
  T totals[kTileResults] = {};
  for (int64_t first = 0; first < depth; first += kDeepSteps) {
    const int64_t left = depth - first;
    TileProduct<precision, T> tile;
    tile.add(a, a_first, b, b_first, static_cast<int>(left < kDeepSteps ? left : kDeepSteps));
    tile.finish(result);
#pragma unroll
    for (int j = 0; j < kTileResults; ++j) totals[j] += result[j];
    a.data += static_cast<int64_t>(kDeepSteps) * a.stride;
    if (b.labels != nullptr) {
      b.labels += kDeepSteps;
    } else {
      b.data += static_cast<int64_t>(kDeepSteps) * b.stride;
    }
  }
#pragma unroll
  for (int j = 0; j < kTileResults; ++j) result[j] = totals[j];
}

}  // namespace fastdni::cuda
