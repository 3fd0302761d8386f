// Batch normalisation with relu as XLA custom calls, over the last axis of float32 arrays.
#include "batch_norm.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;

namespace {

// An array as rows of channels, cut into chunks.
struct Rows {
  int64_t channels, rows, chunk, chunks;
  explicit Rows(const Array& x) {
    channels = x.dimensions().back();
    rows = static_cast<int64_t>(x.element_count()) / channels;
    chunk = batch_norm::ChunkRows(channels);
    chunks = (rows + chunk - 1) / chunk;
  }
  int64_t size(int64_t index) const { return std::min(chunk, rows - index * chunk); }
};

// work(index, offset of its first entry, rows) for every chunk.
template <typename Work>
void ForChunks(ffi::ThreadPool& pool, int64_t parts, const Rows& rows, const Work& work) {
  parts = std::max<int64_t>(std::min(parts, rows.chunks), 1);
  RunParts(pool, parts, [&](int64_t part) {
    const int64_t end = rows.chunks * (part + 1) / parts;
    for (int64_t i = rows.chunks * part / parts; i < end; ++i)
      work(i, i * rows.chunk * rows.channels, rows.size(i));
  });
}

// Mean and biased variance of each channel: chunks by Chan, Golub & LeVeque's formula.
ffi::Error Moments(ffi::ThreadPool pool, Array x, Result mean, Result variance, int64_t parts) {
  const Rows rows(x);
  const int64_t channels = rows.channels;
  std::vector<float> means(rows.chunks * channels), squares(rows.chunks * channels);
  ForChunks(pool, parts, rows, [&](int64_t i, int64_t offset, int64_t count) {
    batch_norm::ChunkMoments(x.typed_data() + offset, count, channels, &means[i * channels],
                             &squares[i * channels]);
  });
  std::vector<double> average(channels), deviations(channels);
  double seen = 0;
  for (int64_t i = 0; i < rows.chunks; ++i) {
    const double count = rows.size(i), total = seen + count;
    for (int64_t c = 0; c < channels; ++c) {
      const double difference = means[i * channels + c] - average[c];
      average[c] += difference * count / total;
      deviations[c] += squares[i * channels + c] + difference * difference * seen * count / total;
    }
    seen = total;
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean->typed_data()[c] = static_cast<float>(average[c]);
    variance->typed_data()[c] = static_cast<float>(deviations[c] / rows.rows);
  }
  return ffi::Error::Success();
}

ffi::Error Apply(ffi::ThreadPool pool, Array x, Array scale, Array bias, ffi::RemainingArgs rest,
                 Result y, int64_t parts) {
  const Rows rows(x);
  const float* shortcut = rest.size() > 0 ? rest.get<Array>(0)->typed_data() : nullptr;
  ForChunks(pool, parts, rows, [&](int64_t, int64_t offset, int64_t count) {
    batch_norm::Apply(x.typed_data() + offset, scale.typed_data(), bias.typed_data(),
                      shortcut == nullptr ? nullptr : shortcut + offset, count, rows.channels,
                      y->typed_data() + offset);
  });
  return ffi::Error::Success();
}

ffi::Error GradientSums(ffi::ThreadPool pool, Array dy, Array y, Array x, Array mean, Result sum,
                        Result product, int64_t parts) {
  const Rows rows(x);
  const int64_t channels = rows.channels;
  std::vector<float> sums(rows.chunks * channels), products(rows.chunks * channels);
  ForChunks(pool, parts, rows, [&](int64_t i, int64_t offset, int64_t count) {
    batch_norm::ChunkGradientSums(dy.typed_data() + offset, y.typed_data() + offset,
                                  x.typed_data() + offset, mean.typed_data(), count, channels,
                                  &sums[i * channels], &products[i * channels]);
  });
  for (int64_t c = 0; c < channels; ++c) {
    double all = 0, all_products = 0;
    for (int64_t i = 0; i < rows.chunks; ++i) {
      all += sums[i * channels + c];
      all_products += products[i * channels + c];
    }
    sum->typed_data()[c] = static_cast<float>(all);
    product->typed_data()[c] = static_cast<float>(all_products);
  }
  return ffi::Error::Success();
}

ffi::Error InputGradient(ffi::ThreadPool pool, Array dy, Array y, Array x, Array scale,
                         Array slope, Array bias, Result dx, ffi::RemainingRets rest,
                         int64_t parts) {
  const Rows rows(x);
  float* dshortcut = rest.size() > 0 ? (*rest.get<Array>(0))->typed_data() : nullptr;
  ForChunks(pool, parts, rows, [&](int64_t, int64_t offset, int64_t count) {
    batch_norm::InputGradient(dy.typed_data() + offset, y.typed_data() + offset,
                              x.typed_data() + offset, scale.typed_data(), slope.typed_data(),
                              bias.typed_data(), count, rows.channels, dx->typed_data() + offset,
                              dshortcut == nullptr ? nullptr : dshortcut + offset);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(KtgMoments, Moments,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("parts"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KtgNormalize, Apply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .RemainingArgs()
                                  .Ret<Array>()
                                  .Attr<int64_t>("parts"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KtgNormalizeGradientSums, GradientSums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("parts"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KtgNormalizeInputGradient, InputGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .RemainingRets()
                                  .Attr<int64_t>("parts"));
