// buffer.h
// Owns:     memory for bytes in flight: a pool of power-of-two blocks, and the buffer that fills one.
// Promises: a block returns to its pool when its owner is destroyed; the steady state allocates only from the free
//           lists; trim() frees the blocks that were not needed since the last call; every block has kPaddingBytes
//           readable bytes after its capacity (simdjson reads that far); lack of memory is reported (an empty block,
//           false), never thrown.
// Leaves:   how much a connection may hold to its owner; the limit over all threads to memory_budget.h.
// Threads:  a pool and everything from it belong to one thread.
// Tested by: tests/buffer_test.cpp
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>
#include <utility>

#include "nexus/base/limits.h"

namespace nexus {

constexpr std::size_t kHugePageBytes = 2u << 20;  // on x86-64

class BlockPool;

// A block of a pool, or nothing.
class Block {
 public:
  Block() = default;

  explicit operator bool() const { return data_ != nullptr; }
  char* data() { return data_.get(); }
  const char* data() const { return data_.get(); }
  std::size_t capacity() const { return data_ == nullptr ? 0 : kSmallestBlock << data_.get_deleter().size_class; }

 private:
  friend class BlockPool;
  struct GiveBack {
    BlockPool* pool;
    std::size_t size_class;
    inline void operator()(char* data) const;
  };
  Block(char* data, BlockPool* pool, std::size_t size_class) : data_(data, GiveBack{pool, size_class}) {}

  std::unique_ptr<char, GiveBack> data_;
};

class BlockPool {
 public:
  BlockPool() = default;
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;
  ~BlockPool() {
    assert(taken_bytes_ == 0);  // every block was given back
    for (auto& list : free_) {
      while (list != nullptr) std::free(pop(list));
    }
  }

  // A block of at least `bytes` (at most 2 GiB), or an empty one if there is no memory.
  Block take(std::size_t bytes) {
    const std::size_t size_class = class_of(bytes);
    if (size_class >= kBlockClasses) return {};
    const std::size_t capacity = kSmallestBlock << size_class;
    char* data = nullptr;
    if (free_[size_class] != nullptr) {
      data = pop(free_[size_class]);
      kept_bytes_ -= capacity;
      spares_[size_class].take();
    } else {
      data = static_cast<char*>(std::malloc(capacity + kPaddingBytes));
      if (data == nullptr) return {};
      prefer_huge_pages(data, capacity);
    }
    taken_bytes_ += capacity;
    return Block(data, this, size_class);
  }

  std::size_t taken_bytes() const { return taken_bytes_; }
  std::size_t kept_bytes() const { return kept_bytes_; }

  // Frees the blocks that were in a free list since the last call. Returns their size, in bytes.
  std::size_t trim() {
    const std::size_t before = kept_bytes_;
    for (std::size_t i = 0; i < kBlockClasses; ++i) {
      for (; spares_[i].least > 0; --spares_[i].least, --spares_[i].count) {
        std::free(pop(free_[i]));
        kept_bytes_ -= kSmallestBlock << i;
      }
      spares_[i].least = spares_[i].count;
    }
    return before - kept_bytes_;
  }

 private:
  friend class Block;
  struct Free {
    Free* next;
  };
  // The length of a free list, now and at least since the last trim().
  struct Spares {
    std::uint32_t count = 0;
    std::uint32_t least = 0;
    void take() { least = std::min(least, --count); }
  };

  static std::size_t class_of(std::size_t bytes) {
    if (bytes <= kSmallestBlock) return 0;
    return static_cast<std::size_t>(std::bit_width((bytes - 1) / kSmallestBlock));
  }

  // With small pages, the page faults of a large block would cost more than everything else done with it. The kernel
  // may ignore this.
  static void prefer_huge_pages(char* data, std::size_t bytes) {
    if (bytes < 2 * kHugePageBytes) return;
    const std::size_t before = -reinterpret_cast<std::uintptr_t>(data) % kHugePageBytes;
    ::madvise(data + before, (bytes - before) / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE);
  }

  static char* pop(Free*& list) {
    Free* first = list;
    list = first->next;
    return reinterpret_cast<char*>(first);
  }

  void give_back(char* data, std::size_t size_class) {
    const std::size_t bytes = kSmallestBlock << size_class;
    taken_bytes_ -= bytes;
    if (kept_bytes_ + bytes > kKeptBytes) {
      std::free(data);
      return;
    }
    kept_bytes_ += bytes;
    spares_[size_class].count += 1;
    free_[size_class] = new (data) Free{free_[size_class]};
  }

  std::array<Free*, kBlockClasses> free_{};
  std::array<Spares, kBlockClasses> spares_{};
  std::size_t kept_bytes_ = 0;
  std::size_t taken_bytes_ = 0;
};

inline void Block::GiveBack::operator()(char* data) const { pool->give_back(data, size_class); }

// A queue of bytes in one block: appended at the end, consumed at the front. Holds no block while it is empty.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    block_ = std::move(other.block_);
    begin_ = std::exchange(other.begin_, 0);
    end_ = std::exchange(other.end_, 0);
    return *this;
  }

  bool empty() const { return begin_ == end_; }
  std::size_t size() const { return end_ - begin_; }
  const char* data() const { return block_.data() + begin_; }
  char* data() { return block_.data() + begin_; }
  std::string_view view() const { return {empty() ? "" : data(), size()}; }

  // The free bytes at tail().
  std::size_t room() const { return block_ ? block_.capacity() - end_ : 0; }
  char* tail() { return block_.data() + end_; }

  // Makes room for `bytes` more. If it returns false there is no memory, and the buffer is unchanged.
  bool reserve(BlockPool& pool, std::size_t bytes) {
    if (room() >= bytes) return true;
    const std::size_t held = size();
    if (block_ && block_.capacity() >= held + bytes && begin_ >= held) {
      std::memcpy(block_.data(), data(), held);
    } else {
      Block larger = pool.take(held + bytes);
      if (!larger) return false;
      if (held > 0) std::memcpy(larger.data(), data(), held);
      block_ = std::move(larger);
    }
    begin_ = 0;
    end_ = held;
    return true;
  }

  // Appends `bytes` that the caller has written at tail().
  void commit(std::size_t bytes) {
    assert(bytes <= room());
    end_ += bytes;
  }

  bool append(BlockPool& pool, std::string_view bytes) {
    if (bytes.empty()) return true;
    if (!reserve(pool, bytes.size())) return false;
    std::memcpy(tail(), bytes.data(), bytes.size());
    commit(bytes.size());
    return true;
  }

  void consume(std::size_t bytes) {
    assert(bytes <= size());
    begin_ += bytes;
    if (empty()) clear();
  }

  // Keeps only the first `bytes` bytes.
  void truncate(std::size_t bytes) {
    assert(bytes <= size());
    end_ = begin_ + bytes;
    if (empty()) clear();
  }

  void clear() {
    if (block_) block_ = Block{};
    begin_ = end_ = 0;
  }

 private:
  Block block_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
};

}  // namespace nexus
