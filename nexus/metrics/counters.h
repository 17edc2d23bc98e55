// counters.h
// Owns:     the storage of a slab: counters with one writer, and the tables of them that grow.
// Promises: recording is a plain add to memory (no lock prefix); what a table holds never moves and is never
//           freed while the table lives, so a reader walks it while its writer adds to it. A known key allocates
//           nothing.
// Leaves:   what the cells mean to slab.h; adding the threads' tables up to its readers.
// Threads:  at() and add(): the owning thread alone. find(), read() and for_each(): any thread, at any time.
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

// Two cache lines: the neighbour line is fetched along with the one asked for, so 64 would still share.
constexpr std::size_t kCacheAlign = 128;

// A number that one thread writes and any thread reads.
// Relaxed suffices: each cell is a value of its own, and no reader concludes from one cell what another must hold.
// In line by force, here and below: in a large translation unit -O2 makes calls of these, and recording half as slow
// again.
class Counter {
 public:
  [[gnu::always_inline]] void add(std::uint64_t n) {
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
    // The load, add and store below in the one instruction that no compiler makes of them. Its store is one of eight
    // aligned bytes, so a reader sees the count before or after it, as below; between them only the owner writes.
    asm("addq %1, %0" : "+m"(value_) : "er"(n) : "cc");
#else
    value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
#endif
  }
  [[gnu::always_inline]] void add_signed(std::int64_t n) { add(static_cast<std::uint64_t>(n)); }
  [[gnu::always_inline]] void set(std::uint64_t v) { value_.store(v, std::memory_order_relaxed); }
  [[gnu::always_inline]] std::uint64_t read() const { return value_.load(std::memory_order_relaxed); }
  std::int64_t read_signed() const { return static_cast<std::int64_t>(read()); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

// Cells for dense indexes from 0. The first kDirect are part of the table itself, for these are the ones of most
// fleets; block k behind them holds kDirect << k, so no index ever moves and finding one is two loads at most.
template <class Cells>
class GrowingTable {
 public:
  GrowingTable() = default;
  GrowingTable(const GrowingTable&) = delete;
  GrowingTable& operator=(const GrowingTable&) = delete;
  ~GrowingTable() {
    for (auto& block : blocks_) delete[] block.load(std::memory_order_relaxed);
  }

  [[gnu::always_inline]] Cells& at(std::uint32_t index) {
    if (index < kDirect) [[likely]]
      return direct_[index];
    return at_block(index);
  }

  // Null where nothing was recorded near that index yet, which reads as zero.
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
  static constexpr Place place_of(std::uint32_t index) {  // of an index from kDirect on
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
      blocks_[place.block].store(block, std::memory_order_release);  // the zeros are written before a reader sees them
    }
    return block[place.offset];
  }

  alignas(kCacheAlign) std::array<Cells, kDirect> direct_{};
  alignas(kCacheAlign) std::array<std::atomic<Cells*>, kBlocks> blocks_{};  // read by all, written 28 times at most
};

// Cells for pairs of ids that are met as traffic brings them. The index is the writer's own; readers walk the list.
template <class Cells>
class PairTable {
 public:
  struct Node {
    std::uint64_t key = 0;       // first << 32 | second; beside the cells, so that one line tells both
    const Node* next = nullptr;  // like the key, set before the node is published and never changed after
    Cells cells;
  };

  PairTable() : index_(kSlots) {}
  PairTable(const PairTable&) = delete;
  PairTable& operator=(const PairTable&) = delete;

  [[gnu::always_inline]] Cells& at(std::uint32_t first, std::uint32_t second) {
    const std::uint64_t key = std::uint64_t{first} << 32 | second;
    Node* node = index_[slot_of(key)];
    if (node != nullptr && node->key == key) [[likely]]
      return node->cells;
    return find_or_add(key);
  }

  template <class Visit>  // visit(first, second, const Cells&), in no order that means anything
  void for_each(Visit&& visit) const {
    for (const Node* node = newest_.load(std::memory_order_acquire); node != nullptr; node = node->next) {
      visit(static_cast<std::uint32_t>(node->key >> 32), static_cast<std::uint32_t>(node->key), node->cells);
    }
  }

 private:
  static constexpr std::size_t kSlots = 64;
  static constexpr std::size_t kChunk = 16;  // nodes that are made at once, side by side

  struct alignas(kCacheAlign) Chunk {
    std::array<Node, kChunk> nodes;
  };

  std::size_t slot_of(std::uint64_t key) const { return static_cast<std::size_t>(key * 0x9E3779B97F4A7C15u >> shift_); }
  std::size_t after(std::size_t slot) const { return (slot + 1) & (index_.size() - 1); }
  Node& node(std::size_t i) const { return chunks_[i / kChunk]->nodes[i % kChunk]; }

  [[gnu::noinline]] Cells& find_or_add(std::uint64_t key) {
    for (std::size_t slot = slot_of(key); index_[slot] != nullptr; slot = after(slot)) {
      if (index_[slot]->key == key) return index_[slot]->cells;
    }
    if (size_ * 2 >= index_.size()) grow_index();
    if (size_ % kChunk == 0) chunks_.push_back(std::make_unique<Chunk>());
    Node& made = node(size_++);
    made.key = key;
    made.next = newest_.load(std::memory_order_relaxed);
    place(made);
    newest_.store(&made, std::memory_order_release);  // publishes the node's fields and its zeros
    return made.cells;
  }

  void grow_index() {
    index_.assign(index_.size() * 2, nullptr);
    --shift_;
    for (std::size_t i = 0; i < size_; ++i) place(node(i));
  }

  void place(Node& node) {
    std::size_t slot = slot_of(node.key);
    while (index_[slot] != nullptr) slot = after(slot);
    index_[slot] = &node;
  }

  // The writer's alone.
  std::vector<Node*> index_;                   // by hash, half full at most
  int shift_ = 64 - std::countr_zero(kSlots);  // leaves as many bits of a hash as index_ has slots for
  std::size_t size_ = 0;
  std::vector<std::unique_ptr<Chunk>> chunks_;

  alignas(kCacheAlign) std::atomic<const Node*> newest_{nullptr};
};

// Counts by HTTP status and by whether the request ended as an error (a stream may break after its 200).
// A cell holds its key in the upper bits, so key and count are one load; zero is a free cell. Five statuses are what a
// pair of model and backend hardly exceeds; the next five are made when they are met.
class StatusCounters {
 public:
  struct Count {
    std::uint32_t status;
    bool failed;
    std::uint64_t count;
  };

  StatusCounters() = default;
  StatusCounters(const StatusCounters&) = delete;
  StatusCounters& operator=(const StatusCounters&) = delete;
  ~StatusCounters() { delete more_.load(std::memory_order_relaxed); }

  [[gnu::always_inline]] void add(std::uint32_t status, bool failed) {
    assert(status >= 100 && status <= 999);
    const std::uint64_t key = status | std::uint64_t{failed} << kStatusBits;
    const std::uint64_t held = cells_[0].read();
    if (held >> kCountBits == key) [[likely]]
      return cells_[0].set(held + 1);
    add_behind_first(key);
  }

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

  [[gnu::noinline]] void add_behind_first(std::uint64_t key) {
    for (StatusCounters* here = this;; here = here->grown()) {
      for (Counter& cell : here->cells_) {
        const std::uint64_t held = cell.read();
        if (held >> kCountBits == key) return cell.set(held + 1);
        if (held == 0) return cell.set((key << kCountBits) + 1);
      }
    }
  }

  // The one allocation that a known pair may cost.
  StatusCounters* grown() {
    StatusCounters* next = more_.load(std::memory_order_relaxed);
    if (next == nullptr) {
      next = new StatusCounters;
      more_.store(next, std::memory_order_release);
    }
    return next;
  }

  std::array<Counter, 5> cells_{};
  std::atomic<StatusCounters*> more_{nullptr};
};

}  // namespace nexus
