// The three 3x3 convolutions of a training step, block by block through Winograd's domain.
#pragma once

#include <algorithm>
#include <cstdint>

#include "multiply.h"
#include "winograd.h"

namespace winograd {

// A block of tiles and its matrices in the transformed domain.
struct Block {
  static constexpr int64_t kCacheFloats = 512 * 1024 / sizeof(float);  // within a second-level cache
  static constexpr int64_t kSkew = 16;  // between matrices: else they would share the cache's sets
  int64_t tiles, in_stride, out_stride, kernel;
  float *kernels, *inputs, *outputs;  // [36, in, out], [36, tiles, in], [36, tiles, out]

  explicit Block(const Shape& s) {
    const int64_t fitting = kCacheFloats / (kPoints * (s.in + s.out)) / 6 * 6;
    tiles = std::max<int64_t>(std::min(fitting, s.tiles()), 12);
    in_stride = tiles * s.in + kSkew;
    out_stride = tiles * s.out + kSkew;
    kernel = s.in * s.out;
    kernels = Scratch<0>(kPoints * kernel);
    inputs = Scratch<1>(kPoints * in_stride);
    outputs = Scratch<2>(kPoints * out_stride);
  }
};

// outputs = images * weights
inline void Convolve(const Shape& s, const float* images, const float* weights, float* outputs) {
  const Block block(s);
  KernelTransform(weights, block.kernel, block.kernels);
  for (int64_t begin = 0; begin < s.tiles(); begin += block.tiles) {
    const int64_t count = std::min(block.tiles, s.tiles() - begin);
    TransformInputs(s, images, begin, count, block.inputs, block.in_stride);
    for (int p = 0; p < kPoints; ++p)
      Multiply<false>(block.inputs + p * block.in_stride, s.in, 1,
                      block.kernels + p * block.kernel, block.outputs + p * block.out_stride,
                      count, s.in, s.out);
    TransformOutputs(s, block.outputs, block.out_stride, begin, count, outputs);
  }
}

// The gradient to the images of Convolve(s, ...), from that of its outputs.
inline void InputGradient(const Shape& s, const float* gradients, const float* weights,
                          float* images) {
  float* turned = Scratch<4>(9 * s.in * s.out);
  Turn(weights, s.in, s.out, turned);
  Convolve({s.batch, s.height, s.width, s.out, s.in}, gradients, turned, images);
}

// The gradient to the weights.
inline void WeightGradient(const Shape& s, const float* images, const float* gradients,
                           float* weights) {
  const Block block(s);
  std::fill(block.kernels, block.kernels + kPoints * block.kernel, 0.0f);
  for (int64_t begin = 0; begin < s.tiles(); begin += block.tiles) {
    const int64_t count = std::min(block.tiles, s.tiles() - begin);
    TransformInputs(s, images, begin, count, block.inputs, block.in_stride);
    TransformOutputGradients(s, gradients, begin, count, block.outputs, block.out_stride);
    for (int p = 0; p < kPoints; ++p)
      Multiply<true>(block.inputs + p * block.in_stride, 1, s.in,
                     block.outputs + p * block.out_stride, block.kernels + p * block.kernel, s.in,
                     count, s.out);
  }
  KernelGradientTransform(block.kernels, block.kernel, weights);
}

}  // namespace winograd
