// SPDX-License-Identifier: MIT
#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/io.h"

namespace edgemoe {
namespace {

// Large enough for the disk's full rate (flat from 256 KiB on), small enough to keep every thread busy.
constexpr uint64_t kPieceBytes = 4u << 20;

}  // namespace

Status ReadRanges(File* file, const edgemoe_range* ranges, int n_ranges, int n_threads) {
  const uint64_t end = RoundUp(file->size_bytes(), kIoAlignment);
  std::vector<edgemoe_range> pieces;
  for (int i = 0; i < n_ranges; ++i) {
    if (ranges[i].offset > end || ranges[i].length > end - ranges[i].offset) {
      return Status(
          EDGEMOE_BAD_FILE,
          Format("read failed: %llu bytes at offset %llu pass the end at %llu (%s); the file is "
                 "truncated: download or convert it again",
                 static_cast<unsigned long long>(ranges[i].length), static_cast<unsigned long long>(ranges[i].offset),
                 static_cast<unsigned long long>(file->size_bytes()), file->path().c_str()));
    }
    for (uint64_t done = 0; done < ranges[i].length; done += kPieceBytes) {
      pieces.push_back({ranges[i].offset + done, std::min(kPieceBytes, ranges[i].length - done),
                        static_cast<char*>(ranges[i].to) + done});
    }
  }
  std::atomic<size_t> next{0};
  std::mutex mutex;
  Status result;
  const auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < pieces.size();) {
      const edgemoe_range& piece = pieces[i];
      const uint64_t in_file = piece.offset < file->size_bytes() ? file->size_bytes() - piece.offset : 0;
      Status status = file->ReadAt(piece.offset, piece.length, std::min(piece.length, in_file), piece.to);
      if (status.ok()) continue;
      std::lock_guard<std::mutex> lock(mutex);
      if (result.ok()) result = std::move(status);
      return;
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(std::max(n_threads, 1)));
  try {
    for (int i = 1; i < n_threads; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do the work.
  }
  work();
  for (std::thread& t : threads) t.join();
  return result;
}

}  // namespace edgemoe
