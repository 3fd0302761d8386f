// One convolution by oneDNN on the calling thread (images NHWC, kernels HWIO, float32).
#pragma once

#include <omp.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>

#include "oneapi/dnnl/dnnl.hpp"

enum class Kind : int64_t { kForward, kInputGradient, kWeightGradient };

struct ConvolutionShape {
  Kind kind;
  int64_t batch, height, width, in, kernel_h, kernel_w, out, out_h, out_w, stride, padding;

  int64_t image() const { return height * width * in; }
  int64_t out_image() const { return out_h * out_w * out; }
  int64_t weights() const { return kernel_h * kernel_w * in * out; }
  auto key() const {
    return std::array<int64_t, 12>{static_cast<int64_t>(kind), batch,    height, width,
                                   in,                         kernel_h, kernel_w, out,
                                   out_h,                      out_w,    stride, padding};
  }
  bool operator<(const ConvolutionShape& other) const { return key() < other.key(); }
};

namespace onednn {

using dnnl::memory;

inline const dnnl::engine& Engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// A primitive with its memories; belongs to one thread.
struct Plan {
  dnnl::primitive convolution;
  memory images, weights, outputs, scratchpad;
  memory plain_weights;   // HWIO, where the caller has them
  dnnl::reorder reorder;  // between plain_weights and weights, which oneDNN lays out as it likes
  bool reordered = false;

  explicit Plan(const ConvolutionShape& s) {
    using tag = memory::format_tag;
    const auto f32 = memory::data_type::f32;
    const memory::desc images_md({s.batch, s.in, s.height, s.width}, f32, tag::nhwc);
    const memory::desc outputs_md({s.batch, s.out, s.out_h, s.out_w}, f32, tag::nhwc);
    const memory::dims weights_dims{s.out, s.in, s.kernel_h, s.kernel_w};
    const memory::desc any_weights(weights_dims, f32, tag::any);
    const memory::desc plain_md(weights_dims, f32, tag::hwio);
    // What lies beyond the padding on the other side follows from the sizes.
    const memory::dims strides{s.stride, s.stride}, left{s.padding, s.padding};
    const memory::dims right{(s.out_h - 1) * s.stride + s.kernel_h - s.height - s.padding,
                             (s.out_w - 1) * s.stride + s.kernel_w - s.width - s.padding};
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const auto algorithm = dnnl::algorithm::convolution_direct;
    const dnnl::convolution_forward::primitive_desc forward(
        Engine(), dnnl::prop_kind::forward_training, algorithm, images_md, any_weights, outputs_md,
        strides, left, right, attr);
    memory::desc weights_md, scratchpad_md;
    if (s.kind == Kind::kForward) {
      weights_md = forward.weights_desc();
      scratchpad_md = forward.scratchpad_desc();
      convolution = dnnl::convolution_forward(forward);
    } else if (s.kind == Kind::kInputGradient) {
      const dnnl::convolution_backward_data::primitive_desc backward(
          Engine(), algorithm, images_md, any_weights, outputs_md, strides, left, right, forward,
          attr);
      weights_md = backward.weights_desc();
      scratchpad_md = backward.scratchpad_desc();
      convolution = dnnl::convolution_backward_data(backward);
    } else {
      const dnnl::convolution_backward_weights::primitive_desc backward(
          Engine(), algorithm, images_md, any_weights, outputs_md, strides, left, right, forward,
          attr);
      weights_md = backward.diff_weights_desc();
      scratchpad_md = backward.scratchpad_desc();
      convolution = dnnl::convolution_backward_weights(backward);
    }
    images = memory(images_md, Engine(), DNNL_MEMORY_NONE);
    outputs = memory(outputs_md, Engine(), DNNL_MEMORY_NONE);
    plain_weights = memory(plain_md, Engine(), DNNL_MEMORY_NONE);
    scratchpad = memory(scratchpad_md, Engine());
    reordered = weights_md != plain_md;
    weights = reordered ? memory(weights_md, Engine()) : plain_weights;
    if (reordered) {
      reorder = s.kind == Kind::kWeightGradient ? dnnl::reorder(weights, plain_weights)
                                                : dnnl::reorder(plain_weights, weights);
    }
  }
};

// oneDNN's own threads are not used: an OpenMP team whose threads spin collapses as soon as another
// process is busy.
struct ThreadState {
  dnnl::stream stream{Engine()};
  std::map<ConvolutionShape, std::unique_ptr<Plan>> plans;
  ThreadState() { omp_set_num_threads(1); }  // in calls from this thread alone
};

// Two of the three arrays are read, and the one that `shape.kind` names is written.
inline void Convolve(const ConvolutionShape& shape, float* images, float* weights,
                     float* outputs) {
  thread_local ThreadState state;
  std::unique_ptr<Plan>& plan = state.plans[shape];
  if (plan == nullptr) plan = std::make_unique<Plan>(shape);
  plan->images.set_data_handle(images);
  plan->outputs.set_data_handle(outputs);
  plan->plain_weights.set_data_handle(weights);
  const bool to_images = shape.kind == Kind::kInputGradient;
  const bool to_weights = shape.kind == Kind::kWeightGradient;
  const bool to_outputs = shape.kind == Kind::kForward;
  if (plan->reordered && !to_weights)
    plan->reorder.execute(state.stream, plan->plain_weights, plan->weights);
  plan->convolution.execute(
      state.stream, {{to_images ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, plan->images},
                     {to_weights ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS, plan->weights},
                     {to_outputs ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, plan->outputs},
                     {DNNL_ARG_SCRATCHPAD, plan->scratchpad}});
  if (plan->reordered && to_weights)
    plan->reorder.execute(state.stream, plan->weights, plan->plain_weights);
  state.stream.wait();
}

}  // namespace onednn
