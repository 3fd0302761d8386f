// Work shared with XLA's own thread pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

// Runs work(0) .. work(parts - 1) on the calling thread and on the pool's.
//
// The caller takes parts too, and waits only for those that another thread has begun: it cannot
// block the pool that it may itself run on, and a pool that is busy costs nothing. What a part
// computes never depends on who computes it.
template <typename Work>
void RunParts(xla::ffi::ThreadPool& pool, int64_t parts, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  const auto shared = std::make_shared<Shared>();
  // A thread that comes too late finds no part left, and never touches `work`.
  const auto take_parts = [shared, parts, work = &work] {
    for (int64_t part; (part = shared->next.fetch_add(1)) < parts;) {
      (*work)(part);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < parts; ++i) pool.Schedule([take_parts] { take_parts(); });
  take_parts();
  while (shared->done.load(std::memory_order_acquire) < parts) std::this_thread::yield();
}
