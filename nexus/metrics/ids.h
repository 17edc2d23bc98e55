// ids.h
// Owns:     a small integer for each name of a model, a backend and a client's key, for the life of the process.
// Promises: an id is never reused or renamed; ids are dense from 0; 0 is the catch-all ("unknown", "none").
// Leaves:   which names get an id to registry.h (a client must not be able to create one).
// Threads:  the control thread alone; workers see ids only, inside snapshots.
// Tested by: tests/registry_test.cpp, tests/labels_test.cpp
#pragma once

#include <cassert>
#include <cstdint>
#include <deque>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>

namespace nexus {

enum class ModelId : std::uint32_t { unknown = 0 };
enum class BackendId : std::uint32_t { none = 0 };
enum class KeyId : std::uint32_t { none = 0, other = 1 };  // none: a request without a key that Nexus knows

constexpr std::uint32_t index_of(ModelId id) { return static_cast<std::uint32_t>(id); }
constexpr std::uint32_t index_of(BackendId id) { return static_cast<std::uint32_t>(id); }
constexpr std::uint32_t index_of(KeyId id) { return static_cast<std::uint32_t>(id); }

// Lets an unordered_map with std::string keys be searched by string_view, without a copy.
struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};

template <class Id>
class NameTable {
 public:
  // `catch_all` is the name of id 0; `capacity` bounds the number of ids, id 0 included.
  NameTable(std::string_view catch_all, std::size_t capacity) : capacity_(capacity) {
    assert(capacity > 0);
    names_.emplace_back(catch_all);
  }

  // The id of `name`, added if it is new; id 0 if the table is full.
  Id intern(std::string_view name) {
    if (auto found = ids_.find(name); found != ids_.end()) return found->second;
    if (names_.size() >= capacity_) return Id{0};
    const Id id{static_cast<std::uint32_t>(names_.size())};
    names_.emplace_back(name);
    try {
      ids_.emplace(names_.back(), id);
    } catch (const std::bad_alloc&) {
      names_.pop_back();  // the id is free again
      throw;
    }
    return id;
  }

  // The id of `name`, or id 0.
  Id find(std::string_view name) const {
    auto found = ids_.find(name);
    return found == ids_.end() ? Id{0} : found->second;
  }

  const std::string& name(Id id) const { return names_.at(index_of(id)); }
  std::size_t size() const { return names_.size(); }
  bool full() const { return names_.size() >= capacity_; }

 private:
  std::size_t capacity_;
  std::deque<std::string> names_;  // a deque, because references must stay valid as it grows
  std::unordered_map<std::string, Id, StringHash, std::equal_to<>> ids_;
};

using ModelNames = NameTable<ModelId>;
using BackendNames = NameTable<BackendId>;
using KeyNames = NameTable<KeyId>;
constexpr std::size_t kOwnKeyNames = 2;  // `none` and `other`

}  // namespace nexus
