// Products of small matrices that lie in the cache.
#pragma once

#include <cstdint>

#include "vec.h"

// kRows x (kVecs * kLanes) entries of c (+)= a b, kept in registers.
template <int kRows, int kVecs, bool kAdd>
inline void MultiplyBlock(const float* a, int64_t row_stride, int64_t depth_stride, const float* b,
                          float* c, int64_t depth, int64_t columns) {
  Vec sum[kRows][kVecs] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = Load(b + k * columns + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float value = a[r * row_stride + k * depth_stride];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] += value * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* to = c + r * columns + v * kLanes;
      // Added at the end: a sum of block sums is more exact than one running sum.
      Store(to, kAdd ? Load(to) + sum[r][v] : sum[r][v]);
    }
}

template <int kVecs, bool kAdd>
inline void MultiplyColumns(const float* a, int64_t row_stride, int64_t depth_stride,
                            const float* b, float* c, int64_t rows, int64_t depth,
                            int64_t columns) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6)
    MultiplyBlock<6, kVecs, kAdd>(a + r * row_stride, row_stride, depth_stride, b, c + r * columns,
                                  depth, columns);
  for (; r + 4 <= rows; r += 4)
    MultiplyBlock<4, kVecs, kAdd>(a + r * row_stride, row_stride, depth_stride, b, c + r * columns,
                                  depth, columns);
  for (; r < rows; ++r)
    MultiplyBlock<1, kVecs, kAdd>(a + r * row_stride, row_stride, depth_stride, b, c + r * columns,
                                  depth, columns);
}

// c [rows, columns] = a b, or c += a b. Entry (r, k) of a is a[r * row_stride + k * depth_stride];
// b [depth, columns] and c are contiguous, columns a multiple of kLanes.
template <bool kAdd>
inline void Multiply(const float* a, int64_t row_stride, int64_t depth_stride, const float* b,
                     float* c, int64_t rows, int64_t depth, int64_t columns) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes)
    MultiplyColumns<2, kAdd>(a, row_stride, depth_stride, b + column, c + column, rows, depth,
                             columns);
  for (; column < columns; column += kLanes)
    MultiplyColumns<1, kAdd>(a, row_stride, depth_stride, b + column, c + column, rows, depth,
                             columns);
}
