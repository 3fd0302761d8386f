// Convolutions as XLA custom calls (images NHWC, kernels HWIO, float32).
//
// Every call runs on one thread for each part of the batch. The parts are put together in order: the
// result depends on their number, not on which thread computes which.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "convolution_3x3.h"
#include "onednn.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;

namespace {

// Whether fewer multiplications outweigh the transforms, tiles that overhang included.
bool UseWinograd(const ConvolutionShape& s) {
  const winograd::Shape tiled{1, s.height, s.width, s.in, s.out};
  return s.kernel_h == 3 && s.kernel_w == 3 && s.stride == 1 && s.padding == 1 &&
         s.in % kLanes == 0 && s.out % kLanes == 0 && tiled.tiles() * 5 < s.height * s.width;
}

void RunPart(const ConvolutionShape& s, float* images, float* weights, float* outputs) {
  if (!UseWinograd(s)) return onednn::Convolve(s, images, weights, outputs);
  const winograd::Shape shape{s.batch, s.height, s.width, s.in, s.out};
  switch (s.kind) {
    case Kind::kForward:
      return winograd::Convolve(shape, images, weights, outputs);
    case Kind::kInputGradient:
      return winograd::InputGradient(shape, outputs, weights, images);
    case Kind::kWeightGradient:
      return winograd::WeightGradient(shape, images, outputs, weights);
  }
}

ffi::Error Run(ffi::ThreadPool& pool, const ConvolutionShape& shape, int64_t parts,
               const float* images, const float* weights, const float* outputs) {
  float* to_images = const_cast<float*>(images);
  float* to_weights = const_cast<float*>(weights);
  float* to_outputs = const_cast<float*>(outputs);
  parts = std::max<int64_t>(std::min(parts, shape.batch), 1);
  const bool sums = shape.kind == Kind::kWeightGradient;
  std::vector<float> others(sums ? (parts - 1) * shape.weights() : 0);
  std::vector<std::string> errors(parts);
  RunParts(pool, parts, [&](int64_t part) {
    const int64_t begin = shape.batch * part / parts, end = shape.batch * (part + 1) / parts;
    ConvolutionShape share = shape;
    share.batch = end - begin;
    float* own = sums && part > 0 ? others.data() + (part - 1) * shape.weights() : to_weights;
    try {
      RunPart(share, to_images + begin * shape.image(), own,
              to_outputs + begin * shape.out_image());
    } catch (const std::exception& error) {  // none may leave a thread of the pool
      errors[part] = error.what();
    }
  });
  for (const std::string& error : errors)
    if (!error.empty()) return ffi::Error::Internal("convolution: " + error);
  for (size_t i = 0; i < others.size(); ++i) to_weights[i % shape.weights()] += others[i];
  return ffi::Error::Success();
}

ConvolutionShape ShapeOf(Kind kind, ffi::Span<const int64_t> images,
                         ffi::Span<const int64_t> weights, ffi::Span<const int64_t> outputs,
                         int64_t stride, int64_t padding) {
  return {kind,       images[0],  images[1],  images[2],  images[3], weights[0],
          weights[1], weights[3], outputs[1], outputs[2], stride,    padding};
}

ffi::Error Forward(ffi::ThreadPool pool, Array images, Array weights, Result outputs,
                   int64_t stride, int64_t padding, int64_t parts) {
  return Run(pool,
             ShapeOf(Kind::kForward, images.dimensions(), weights.dimensions(),
                     outputs->dimensions(), stride, padding),
             parts, images.typed_data(), weights.typed_data(), outputs->typed_data());
}

ffi::Error InputGradient(ffi::ThreadPool pool, Array gradients, Array weights, Result images,
                         int64_t stride, int64_t padding, int64_t parts) {
  return Run(pool,
             ShapeOf(Kind::kInputGradient, images->dimensions(), weights.dimensions(),
                     gradients.dimensions(), stride, padding),
             parts, images->typed_data(), weights.typed_data(), gradients.typed_data());
}

ffi::Error WeightGradient(ffi::ThreadPool pool, Array images, Array gradients, Result weights,
                          int64_t stride, int64_t padding, int64_t parts) {
  return Run(pool,
             ShapeOf(Kind::kWeightGradient, images.dimensions(), weights->dimensions(),
                     gradients.dimensions(), stride, padding),
             parts, images.typed_data(), weights->typed_data(), gradients.typed_data());
}

#define BINDING()                                                              \
  ffi::Ffi::Bind()                                                             \
      .Ctx<ffi::ThreadPool>()                                                  \
      .Arg<Array>()                                                            \
      .Arg<Array>()                                                            \
      .Ret<Array>()                                                            \
      .Attr<int64_t>("stride")                                                 \
      .Attr<int64_t>("padding")                                                \
      .Attr<int64_t>("parts")

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(KtgConvolution, Forward, BINDING());
XLA_FFI_DEFINE_HANDLER_SYMBOL(KtgConvolutionInputGradient, InputGradient, BINDING());
XLA_FFI_DEFINE_HANDLER_SYMBOL(KtgConvolutionWeightGradient, WeightGradient, BINDING());
