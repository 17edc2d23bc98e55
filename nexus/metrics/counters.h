// counters.h
// Owns:     the storage of a slab: counters with one writer, and tables of them that grow.
// Promises: recording is a plain add to memory (no lock prefix); table entries never move and live as long as the
//           table, so readers can walk it while the writer adds to it. A known key allocates nothing.
// Leaves:   what is counted to slab.h; the sums over all threads to its readers.
// Threads:  at() and add(): the owning thread alone. find(), read() and for_each(): any thread, at any time.
// Tested by: tests/slab_test.cpp
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace nexus {

// Two cache lines: the hardware prefetches lines in pairs, so with 64 neighbours would still share.
constexpr std::size_t kCacheAlign = 128;

// A number that one thread writes and any thread reads. Relaxed suffices: no reader derives the value of one counter
// from that of another. always_inline, here and below, because in a large translation unit -O2 would emit calls, which
// makes recording 1.5 times as slow.
class Counter {
 public:
  [[gnu::always_inline]] void add(std::uint64_t n) {
    value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
  }
  [[gnu::always_inline]] void add_signed(std::int64_t n) { add(static_cast<std::uint64_t>(n)); }
  [[gnu::always_inline]] void set(std::uint64_t v) { value_.store(v, std::memory_order_relaxed); }
  [[gnu::always_inline]] std::uint64_t read() const { return value_.load(std::memory_order_relaxed); }
  std::int64_t read_signed() const { return static_cast<std::int64_t>(read()); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

// Cells for dense indexes from 0. The first kDirect, enough for most fleets, are part of the table itself; block k
// after them holds kDirect << k, so no cell ever moves and finding one takes two loads at most.
template <class Cells>
class GrowingTable {
 public:
  ~GrowingTable() {
    for (auto& block : blocks_) delete[] block.load(std::memory_order_relaxed);
  }

  [[gnu::always_inline]] Cells& at(std::uint32_t index) {
    if (index < kDirect) [[likely]]
      return direct_[index];
    return at_block(index);
  }

  // Null if the index has no block yet: treat it as zero.
  const Cells* find(std::uint32_t index) const {
    if (index < kDirect) [[likely]]
      return &direct_[index];
    const Place place = place_of(index);
    const Cells* block = blocks_[place.block].load(std::memory_order_acquire);
    return block == nullptr ? nullptr : block + place.offset;
  }

 private:
  static constexpr std::uint64_t kDirect = 32;
  static constexpr std::size_t kBlocks = 28;  // enough for every 32-bit index

  struct Place {
    std::size_t block;
    std::size_t offset;
  };
  static constexpr Place place_of(std::uint32_t index) {  // index >= kDirect
    const auto block = static_cast<std::size_t>(std::bit_width(std::uint64_t{index}) - std::bit_width(kDirect));
    return {block, index - (kDirect << block)};
  }
  static_assert(place_of(32).block == 0 && place_of(63).offset == 31 && place_of(64).block == 1);
  static_assert(place_of(UINT32_MAX).block < kBlocks);

  [[gnu::noinline]] Cells& at_block(std::uint32_t index) {
    const Place place = place_of(index);
    Cells* block = blocks_[place.block].load(std::memory_order_relaxed);
    if (block == nullptr) {
      block = new Cells[kDirect << place.block]();
      blocks_[place.block].store(block, std::memory_order_release);  // publishes the zeros
    }
    return block[place.offset];
  }

  alignas(kCacheAlign) std::array<Cells, kDirect> direct_{};
  alignas(kCacheAlign) std::array<std::atomic<Cells*>, kBlocks> blocks_{};  // each written once at most
};

// Cells for pairs of ids, added as they occur. The hash index is the writer's own; readers walk the list.
template <class Cells>
class PairTable {
 public:
  struct Node {
    std::uint64_t key = 0;       // first << 32 | second; in the same cache line as the first cells
    const Node* next = nullptr;  // key and next are set before the node is published, and never change
    Cells cells;
  };

  PairTable() : index_(kSlots) {}

  [[gnu::always_inline]] Cells& at(std::uint32_t first, std::uint32_t second) {
    const std::uint64_t key = std::uint64_t{first} << 32 | second;
    Node* node = index_[slot_of(key)];
    if (node != nullptr && node->key == key) [[likely]]
      return node->cells;
    return find_or_add(key);
  }

  template <class Visit>  // visit(first, second, const Cells&), in no particular order
  void for_each(Visit&& visit) const {
    for (const Node* node = newest_.load(std::memory_order_acquire); node != nullptr; node = node->next) {
      visit(static_cast<std::uint32_t>(node->key >> 32), static_cast<std::uint32_t>(node->key), node->cells);
    }
  }

 private:
  static constexpr std::size_t kSlots = 64;
  static constexpr std::size_t kChunk = 16;  // nodes per allocation; adjacent, so that they use all sets of the cache

  struct alignas(kCacheAlign) Chunk {
    std::array<Node, kChunk> nodes;
  };

  std::size_t slot_of(std::uint64_t key) const { return static_cast<std::size_t>(key * 0x9E3779B97F4A7C15u >> shift_); }
  Node& node(std::size_t i) const { return chunks_[i / kChunk]->nodes[i % kChunk]; }

  [[gnu::noinline]] Cells& find_or_add(std::uint64_t key) {
    if (Node* const known = index_[find_slot(key)]) return known->cells;
    if (size_ * 2 >= index_.size()) grow_index();
    if (size_ % kChunk == 0) chunks_.push_back(std::make_unique<Chunk>());
    Node& made = node(size_++);
    made.key = key;
    made.next = newest_.load(std::memory_order_relaxed);
    index_[find_slot(key)] = &made;
    newest_.store(&made, std::memory_order_release);  // publishes the node's fields and its zeros
    return made.cells;
  }

  void grow_index() {
    index_.assign(index_.size() * 2, nullptr);
    --shift_;
    for (std::size_t i = 0; i < size_; ++i) index_[find_slot(node(i).key)] = &node(i);
  }

  // The slot that holds `key`, or the empty one where it belongs.
  std::size_t find_slot(std::uint64_t key) const {
    std::size_t slot = slot_of(key);
    while (index_[slot] != nullptr && index_[slot]->key != key) slot = (slot + 1) & (index_.size() - 1);
    return slot;
  }

  // For the writer alone.
  std::vector<Node*> index_;                   // by hash, with linear probing; at most half full
  int shift_ = 64 - std::countr_zero(kSlots);  // leaves log2(index_.size()) bits of a hash
  std::size_t size_ = 0;
  std::vector<std::unique_ptr<Chunk>> chunks_;

  alignas(kCacheAlign) std::atomic<const Node*> newest_{nullptr};
};

// Counts by HTTP status and failure (a stream may break after its 200). A cell has its key in the upper bits, so key
// and count are one load; zero is a free cell. A pair of model and backend rarely has more than five statuses; a sixth
// allocates the next five cells.
class StatusCounters {
 public:
  struct Count {
    std::uint32_t status;
    bool failed;
    std::uint64_t count;
  };

  ~StatusCounters() { delete more_.load(std::memory_order_relaxed); }

  // One cell, found. Finding may throw std::bad_alloc, counting in it does not.
  class Cell {
   public:
    [[gnu::always_inline]] void add() { cell_->set((cell_->read() | key_ << kCountBits) + 1); }

   private:
    friend class StatusCounters;
    Cell(Counter& cell, std::uint64_t key) : cell_(&cell), key_(key) {}
    Counter* cell_;  // free, or the key's
    std::uint64_t key_;
  };

  [[gnu::always_inline]] Cell find(std::uint32_t status, bool failed) {
    assert(status >= 100 && status <= 999);
    const std::uint64_t key = status | std::uint64_t{failed} << kStatusBits;
    if (cells_[0].read() >> kCountBits == key) [[likely]]
      return {cells_[0], key};
    return {find_another(key), key};
  }
  void add(std::uint32_t status, bool failed) { find(status, failed).add(); }

  template <class Visit>  // visit(Count), each key once
  void for_each(Visit&& visit) const {
    for (const StatusCounters* here = this; here != nullptr; here = here->more_.load(std::memory_order_acquire)) {
      for (const Counter& cell : here->cells_) {
        const std::uint64_t held = cell.read();
        if (held == 0) return;
        const std::uint64_t key = held >> kCountBits;
        visit(Count{static_cast<std::uint32_t>(key & kStatusMask), (key >> kStatusBits) != 0, held & kCountMask});
      }
    }
  }

 private:
  static constexpr unsigned kStatusBits = 10;
  static constexpr unsigned kCountBits = 64 - kStatusBits - 1;  // 2^53 requests of one status
  static constexpr std::uint64_t kStatusMask = (1u << kStatusBits) - 1;
  static constexpr std::uint64_t kCountMask = (std::uint64_t{1} << kCountBits) - 1;

  // The key's cell, or the first free one.
  [[gnu::noinline]] Counter& find_another(std::uint64_t key) {
    for (StatusCounters* here = this;; here = here->next()) {
      for (Counter& cell : here->cells_) {
        const std::uint64_t held = cell.read();
        if (held >> kCountBits == key || held == 0) return cell;
      }
    }
  }

  // The next five cells: the only allocation for a known pair.
  StatusCounters* next() {
    StatusCounters* next = more_.load(std::memory_order_relaxed);
    if (next == nullptr) more_.store(next = new StatusCounters, std::memory_order_release);
    return next;
  }

  std::array<Counter, 5> cells_{};
  std::atomic<StatusCounters*> more_{nullptr};
};

}  // namespace nexus
