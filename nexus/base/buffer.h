// buffer.h
// Owns:     memory for bytes in flight: a pool of power-of-two blocks, and the buffer that fills one.
// Promises: a block goes back to its pool when its owner dies; the steady state takes only from the free lists; every
//           block has kPaddingBytes readable behind its capacity (simdjson reads that far); no memory is an answer
//           (an empty block, a false), never an exception.
// Leaves:   how much a connection may hold to its owner; budgets over all threads to memory_budget.h.
// Threads:  a pool and everything from it belong to one thread.
#pragma once

#include <sys/mman.h>

#include <array>
#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>

namespace nexus {

constexpr std::size_t kPaddingBytes = 64;      // simdjson::SIMDJSON_PADDING; request_json.h asserts that it is enough
constexpr std::size_t kSmallestBlock = 4096;   // the capacity of a block of class 0
constexpr std::size_t kBlockClasses = 20;      // 4 KiB … 2 GiB
constexpr std::size_t kKeptBytes = 32u << 20;  // what a pool keeps in its free lists at most
constexpr std::size_t kHugePageBytes = 2u << 20;
constexpr std::size_t kRoomyBlock = 64u << 10;  // the capacity that receives a response in one read

class BlockPool;

// One block of a pool, or nothing. Movable; gives the block back when it dies.
class Block {
 public:
  Block() = default;
  Block(Block&& other) noexcept { swap(other); }
  Block& operator=(Block&& other) noexcept {
    Block taken(std::move(other));
    swap(taken);
    return *this;
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  inline ~Block();

  explicit operator bool() const { return data_ != nullptr; }
  char* data() { return data_; }
  const char* data() const { return data_; }
  std::size_t capacity() const { return data_ == nullptr ? 0 : kSmallestBlock << class_; }

 private:
  friend class BlockPool;
  void swap(Block& other) {
    std::swap(data_, other.data_);
    std::swap(pool_, other.pool_);
    std::swap(class_, other.class_);
  }

  char* data_ = nullptr;
  BlockPool* pool_ = nullptr;
  std::size_t class_ = 0;
};

class BlockPool {
 public:
  BlockPool() = default;
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;
  ~BlockPool() {
    assert(taken_bytes_ == 0);  // every block came home
    for (auto& list : free_) {
      while (list != nullptr) std::free(pop(list));
    }
  }

  // A block of at least `bytes` (at most 2 GiB), or an empty one when memory is short.
  Block take(std::size_t bytes) {
    const std::size_t klass = class_of(bytes);
    if (klass >= kBlockClasses) return {};
    Block block;
    if (free_[klass] != nullptr) {
      block.data_ = pop(free_[klass]);
      kept_bytes_ -= kSmallestBlock << klass;
    } else {
      block.data_ = static_cast<char*>(std::malloc((kSmallestBlock << klass) + kPaddingBytes));
      if (block.data_ == nullptr) return {};
      prefer_huge_pages(block.data_, kSmallestBlock << klass);
    }
    block.pool_ = this;
    block.class_ = klass;
    taken_bytes_ += block.capacity();
    return block;
  }

  std::size_t taken_bytes() const { return taken_bytes_; }
  std::size_t kept_bytes() const { return kept_bytes_; }

 private:
  friend class Block;
  struct Free {
    Free* next;
  };

  static std::size_t class_of(std::size_t bytes) {
    if (bytes <= kSmallestBlock) return 0;
    return static_cast<std::size_t>(std::bit_width((bytes - 1) / kSmallestBlock));
  }

  // The faults of a large block's many small pages, and giving them back, cost more than all else that is done with it.
  // A kernel that has no huge pages to give goes on without.
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

  void give_back(char* data, std::size_t klass) {
    const std::size_t bytes = kSmallestBlock << klass;
    taken_bytes_ -= bytes;
    if (kept_bytes_ + bytes > kKeptBytes) {
      std::free(data);
      return;
    }
    kept_bytes_ += bytes;
    free_[klass] = new (data) Free{free_[klass]};
  }

  std::array<Free*, kBlockClasses> free_{};
  std::size_t kept_bytes_ = 0;
  std::size_t taken_bytes_ = 0;
};

inline Block::~Block() {
  if (data_ != nullptr) pool_->give_back(data_, class_);
}

// Bytes in arrival order in one block: appended behind, consumed in front. Holds no block while it is empty.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept
      : block_(std::move(other.block_)), begin_(std::exchange(other.begin_, 0)), end_(std::exchange(other.end_, 0)) {}
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

  // Room behind the bytes that is there without growing.
  std::size_t room() const { return block_ ? block_.capacity() - end_ : 0; }
  char* tail() { return block_.data() + end_; }

  // Makes room for `bytes` more. False when memory is short; the buffer is then as it was.
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

  // `bytes` were written at tail().
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

  // Cuts what lies behind the first `bytes` bytes.
  void truncate(std::size_t bytes) {
    assert(bytes <= size());
    end_ = begin_ + bytes;
    if (empty()) clear();
  }

  void clear() {
    block_ = Block{};
    begin_ = end_ = 0;
  }

 private:
  Block block_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
};

}  // namespace nexus
