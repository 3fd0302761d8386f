// relu(batch normalisation + shortcut) over the rows of [rows, channels], and its gradient.
//
// Channels are multiples of kLanes. Sums are taken chunk by chunk and put together in the order of
// the chunks: they do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vec.h"

namespace batch_norm {

// Rows of a chunk: few enough to stay in the first-level cache between two passes.
inline int64_t ChunkRows(int64_t channels) { return std::max<int64_t>(4096 / channels, 16); }

// The sum over the rows of term(row), with four partial sums: a single one would have to wait for
// each addition.
template <typename Term>
inline Vec SumRows(int64_t rows, const Term& term) {
  Vec sums[4] = {};
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sums[u] += term(r + u);
  for (; r < rows; ++r) sums[0] += term(r);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A chunk's mean and its sum of squared deviations from that mean.
inline void ChunkMoments(const float* x, int64_t rows, int64_t channels, float* mean,
                         float* squares) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const auto value = [&](int64_t r) { return Load(x + r * channels + c); };
    const Vec average = SumRows(rows, value) / static_cast<float>(rows);
    Store(mean + c, average);
    Store(squares + c, SumRows(rows, [&](int64_t r) {
            const Vec deviation = value(r) - average;
            return deviation * deviation;
          }));
  }
}

// y = relu(x * scale + bias + shortcut), channel by channel; shortcut may be null.
inline void Apply(const float* x, const float* scale, const float* bias, const float* shortcut,
                  int64_t rows, int64_t channels, float* y) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t i = r * channels + c;
      Vec value = Load(x + i) * Load(scale + c) + Load(bias + c);
      if (shortcut != nullptr) value += Load(shortcut + i);
      Store(y + i, value > 0.0f ? value : Vec{});
    }
}

// The gradient before the relu, from that behind it.
inline Vec BeforeRelu(Vec gradient, Vec y) { return y > 0.0f ? gradient : Vec{}; }

// A chunk's sums of the gradient before the relu: alone, and times x - mean.
inline void ChunkGradientSums(const float* dy, const float* y, const float* x, const float* mean,
                              int64_t rows, int64_t channels, float* sum, float* product) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Vec average = Load(mean + c);
    Vec sums[2] = {}, products[2] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r * channels + c;
      const Vec gradient = BeforeRelu(Load(dy + i), Load(y + i));
      sums[r & 1] += gradient;
      products[r & 1] += gradient * (Load(x + i) - average);
    }
    Store(sum + c, sums[0] + sums[1]);
    Store(product + c, products[0] + products[1]);
  }
}

// dx = scale * g + slope * x + bias with g the gradient before the relu, which is the shortcut's;
// dshortcut may be null.
inline void InputGradient(const float* dy, const float* y, const float* x, const float* scale,
                          const float* slope, const float* bias, int64_t rows, int64_t channels,
                          float* dx, float* dshortcut) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t i = r * channels + c;
      const Vec gradient = BeforeRelu(Load(dy + i), Load(y + i));
      if (dshortcut != nullptr) Store(dshortcut + i, gradient);
      Store(dx + i, Load(scale + c) * gradient + Load(slope + c) * Load(x + i) + Load(bias + c));
    }
}

}  // namespace batch_norm
