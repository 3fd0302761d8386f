// 3x3 convolutions of stride 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray, 2016).
//
// A tile of 4x4 outputs takes 36 multiplications for each pair of channels instead of 144. With the
// interpolation points 0, +-3/4, +-3/2 and infinity the rounding error is a third of that with the
// usual 0, +-1, +-2 and infinity. Images are NHWC, kernels HWIO; channels are multiples of kLanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace winograd {

constexpr int kTile = 4, kPatch = 6, kPoints = kPatch * kPatch;
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

struct Shape {
  int64_t batch, height, width, in, out;
  int64_t rows() const { return (height + kTile - 1) / kTile; }
  int64_t columns() const { return (width + kTile - 1) / kTile; }
  int64_t tiles() const { return batch * rows() * columns(); }
};

// One-dimensional transforms; the two-dimensional ones apply them to columns, then to rows.

// B^T d: 6 inputs -> 6 points.
inline void InputTransform(const Vec (&d)[kPatch], Vec (&v)[kPatch]) {
  const Vec even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
  const Vec even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
  v[0] = kA2 * kB2 * d[0] - (kA2 + kB2) * d[2] + d[4];
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = kA2 * kB2 * d[1] - (kA2 + kB2) * d[3] + d[5];
}

// A^T m: 6 points -> 4 outputs.
inline void OutputTransform(const Vec (&m)[kPatch], Vec (&y)[kTile]) {
  const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Vec sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = kA * difference_a + kB * difference_b;
  y[2] = kA2 * sum_a + kB2 * sum_b;
  y[3] = kA2 * kA * difference_a + kB2 * kB * difference_b + m[5];
}

// A y: 4 outputs' gradients -> 6 points.
inline void OutputGradientTransform(const Vec (&y)[kTile], Vec (&m)[kPatch]) {
  const Vec even_a = y[0] + kA2 * y[2], odd_a = kA * (y[1] + kA2 * y[3]);
  const Vec even_b = y[0] + kB2 * y[2], odd_b = kB * (y[1] + kB2 * y[3]);
  m[0] = y[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = y[3];
}

// G: at each point its powers, over the product of its distances from the other points.
constexpr float kNa = 2 * kA2 * (kA2 - kB2), kNb = 2 * kB2 * (kB2 - kA2);
constexpr float kG[kPatch][3] = {{1 / (kA2 * kB2), 0, 0},      {1 / kNa, kA / kNa, kA2 / kNa},
                                 {1 / kNa, -kA / kNa, kA2 / kNa}, {1 / kNb, kB / kNb, kB2 / kNb},
                                 {1 / kNb, -kB / kNb, kB2 / kNb}, {0, 0, 1}};

// G w G^T: [3, 3, in * out] -> [36, in * out].
inline void KernelTransform(const float* weights, int64_t size, float* to) {
  for (int64_t c = 0; c < size; c += kLanes) {
    Vec half[kPatch][3];
    for (int i = 0; i < kPatch; ++i)
      for (int b = 0; b < 3; ++b)
        half[i][b] = kG[i][0] * Load(weights + b * size + c) +
                     kG[i][1] * Load(weights + (3 + b) * size + c) +
                     kG[i][2] * Load(weights + (6 + b) * size + c);
    for (int i = 0; i < kPatch; ++i)
      for (int j = 0; j < kPatch; ++j)
        Store(to + (i * kPatch + j) * size + c,
              kG[j][0] * half[i][0] + kG[j][1] * half[i][1] + kG[j][2] * half[i][2]);
  }
}

// G^T u G: [36, in * out] -> [3, 3, in * out].
inline void KernelGradientTransform(const float* from, int64_t size, float* weights) {
  for (int64_t c = 0; c < size; c += kLanes) {
    Vec half[3][kPatch];
    for (int a = 0; a < 3; ++a)
      for (int j = 0; j < kPatch; ++j) {
        half[a][j] = kG[0][a] * Load(from + j * size + c);
        for (int i = 1; i < kPatch; ++i)
          half[a][j] += kG[i][a] * Load(from + (i * kPatch + j) * size + c);
      }
    for (int a = 0; a < 3; ++a)
      for (int b = 0; b < 3; ++b) {
        Vec sum = kG[0][b] * half[a][0];
        for (int j = 1; j < kPatch; ++j) sum += kG[j][b] * half[a][j];
        Store(weights + (a * 3 + b) * size + c, sum);
      }
  }
}

// The kernel turned by half a turn, with its channels exchanged: HWIO -> HWOI.
inline void Turn(const float* weights, int64_t in, int64_t out, float* to) {
  for (int k = 0; k < 9; ++k)
    for (int64_t i = 0; i < in; ++i)
      for (int64_t o = 0; o < out; ++o)
        to[((8 - k) * out + o) * in + i] = weights[(k * in + i) * out + o];
}

// The pixel of a tile's upper left output.
struct Origin {
  int64_t image, row, column;
  Origin(const Shape& s, int64_t tile) {
    const int64_t within = tile % (s.rows() * s.columns());
    image = tile / (s.rows() * s.columns());
    row = within / s.columns() * kTile;
    column = within % s.columns() * kTile;
  }
};

// Tiles begin .. begin + count - 1 of NHWC images -> [36, count, in], matrices `stride` apart.
inline void TransformInputs(const Shape& s, const float* images, int64_t begin, int64_t count,
                            float* to, int64_t stride) {
  const float* zeros = Scratch<3>(s.in);  // never written: what lies beyond the image
  for (int64_t t = 0; t < count; ++t) {
    const Origin o(s, begin + t);
    const float* pixels[kPatch][kPatch];
    for (int i = 0; i < kPatch; ++i)
      for (int j = 0; j < kPatch; ++j) {
        const int64_t y = o.row + i - 1, x = o.column + j - 1;
        const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
        pixels[i][j] =
            inside ? images + ((o.image * s.height + y) * s.width + x) * s.in : zeros;
      }
    for (int64_t c = 0; c < s.in; c += kLanes) {
      Vec half[kPatch][kPatch];
      for (int j = 0; j < kPatch; ++j) {
        Vec d[kPatch], v[kPatch];
        for (int i = 0; i < kPatch; ++i) d[i] = Load(pixels[i][j] + c);
        InputTransform(d, v);
        for (int i = 0; i < kPatch; ++i) half[i][j] = v[i];
      }
      for (int i = 0; i < kPatch; ++i) {
        Vec v[kPatch];
        InputTransform(half[i], v);
        for (int j = 0; j < kPatch; ++j)
          Store(to + (i * kPatch + j) * stride + t * s.in + c, v[j]);
      }
    }
  }
}

// The same of the outputs' gradients -> [36, count, out].
inline void TransformOutputGradients(const Shape& s, const float* gradients, int64_t begin,
                                     int64_t count, float* to, int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    const Origin o(s, begin + t);
    for (int64_t c = 0; c < s.out; c += kLanes) {
      Vec half[kPatch][kTile];
      for (int j = 0; j < kTile; ++j) {
        Vec y[kTile], m[kPatch];
        for (int i = 0; i < kTile; ++i) {
          const int64_t row = o.row + i, column = o.column + j;
          const int64_t pixel = (o.image * s.height + row) * s.width + column;
          const bool inside = row < s.height && column < s.width;
          y[i] = inside ? Load(gradients + pixel * s.out + c) : Vec{};
        }
        OutputGradientTransform(y, m);
        for (int i = 0; i < kPatch; ++i) half[i][j] = m[i];
      }
      for (int i = 0; i < kPatch; ++i) {
        Vec m[kPatch];
        OutputGradientTransform(half[i], m);
        for (int j = 0; j < kPatch; ++j)
          Store(to + (i * kPatch + j) * stride + t * s.out + c, m[j]);
      }
    }
  }
}

// [36, count, out] -> tiles begin .. begin + count - 1 of the outputs.
inline void TransformOutputs(const Shape& s, const float* from, int64_t stride, int64_t begin,
                             int64_t count, float* outputs) {
  for (int64_t t = 0; t < count; ++t) {
    const Origin o(s, begin + t);
    for (int64_t c = 0; c < s.out; c += kLanes) {
      Vec half[kTile][kPatch];
      for (int j = 0; j < kPatch; ++j) {
        Vec m[kPatch], y[kTile];
        for (int i = 0; i < kPatch; ++i)
          m[i] = Load(from + (i * kPatch + j) * stride + t * s.out + c);
        OutputTransform(m, y);
        for (int i = 0; i < kTile; ++i) half[i][j] = y[i];
      }
      for (int i = 0; i < kTile && o.row + i < s.height; ++i) {
        Vec y[kTile];
        OutputTransform(half[i], y);
        const int64_t pixel = (o.image * s.height + o.row + i) * s.width + o.column;
        for (int j = 0; j < kTile && o.column + j < s.width; ++j)
          Store(outputs + (pixel + j) * s.out + c, y[j]);
      }
    }
  }
}

}  // namespace winograd
