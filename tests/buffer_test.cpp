// buffer_test.cpp
// Goal:   blocks return to their pool, and a buffer is a queue of bytes that holds no block while it is empty.
// Method: single steps, then random operations against a std::string.
#include "nexus/base/buffer.h"

#include <doctest/doctest.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

using nexus::Block;
using nexus::BlockPool;
using nexus::Buffer;

TEST_CASE("a block has the requested capacity, rounded up to a power of two") {
  BlockPool pool;
  struct Row {
    std::size_t asked, got;
  };
  for (const Row row : {Row{0, 4096}, Row{1, 4096}, Row{4096, 4096}, Row{4097, 8192}, Row{8192, 8192}, Row{8193, 16384},
                        Row{nexus::kRoomyBlock, nexus::kRoomyBlock}, Row{1u << 20, 1u << 20}}) {
    Block block = pool.take(row.asked);
    REQUIRE(block);
    CHECK(block.capacity() == row.got);
    CHECK(pool.taken_bytes() == row.got);
    std::memset(block.data(), 1,
                block.capacity() + nexus::kPaddingBytes);  // the padding is there, or the sanitizer reports it
  }
  CHECK(pool.taken_bytes() == 0);
}

TEST_CASE("a destroyed block is the next one taken of its size") {
  BlockPool pool;
  const char* first;
  {
    Block block = pool.take(100);
    first = block.data();
  }
  CHECK(pool.kept_bytes() == 4096);
  Block larger = pool.take(5000);
  CHECK(larger.data() != first);
  Block again = pool.take(4096);
  CHECK(again.data() == first);
  CHECK(pool.kept_bytes() == 0);
}

TEST_CASE("trim() frees the blocks that were not needed since the last call, of each size") {
  BlockPool pool;
  const auto use = [&](std::size_t small, std::size_t large) {
    std::vector<Block> blocks;
    for (std::size_t i = 0; i < small; ++i) blocks.push_back(pool.take(4096));
    for (std::size_t i = 0; i < large; ++i) blocks.push_back(pool.take(16384));
  };
  use(5, 3);
  CHECK(pool.trim() == 0);  // all were in use since the pool was made
  use(2, 0);
  CHECK(pool.trim() == 3 * 4096 + 3 * 16384);
  CHECK(pool.kept_bytes() == 2 * 4096);
  use(1, 0);
  CHECK(pool.trim() == 4096);
  CHECK(pool.trim() == 4096);
  CHECK(pool.kept_bytes() == 0);
  use(1, 1);
  CHECK(pool.kept_bytes() == 4096 + 16384);
}

TEST_CASE("a pool keeps no more than kKeptBytes") {
  BlockPool pool;
  {
    std::vector<Block> blocks;
    for (int i = 0; i < 5; ++i) blocks.push_back(pool.take(8u << 20));
  }
  CHECK(pool.taken_bytes() == 0);
  CHECK(pool.kept_bytes() == nexus::kKeptBytes);
}

TEST_CASE("a block that is too large is empty, not a crash") {
  BlockPool pool;
  CHECK_FALSE(pool.take(std::size_t{1} << 32));
  CHECK_FALSE(pool.take(SIZE_MAX));
  Buffer buffer;
  REQUIRE(buffer.append(pool, "abc"));
  CHECK_FALSE(buffer.reserve(pool, std::size_t{1} << 32));
  CHECK(buffer.view() == "abc");
}

TEST_CASE("a moved block leaves an empty one, and an overwritten block is given back") {
  BlockPool pool;
  Block one = pool.take(1), two = pool.take(1);
  const char* kept = two.data();
  one = std::move(two);
  CHECK(one.data() == kept);
  CHECK_FALSE(two);
  CHECK(two.capacity() == 0);
  CHECK(pool.taken_bytes() == 4096);
  one = Block();
  CHECK(pool.taken_bytes() == 0);
}

TEST_CASE("a buffer holds no block while it is empty") {
  BlockPool pool;
  Buffer buffer;
  CHECK(buffer.empty());
  CHECK(buffer.view().empty());
  REQUIRE(buffer.append(pool, ""));
  CHECK(pool.taken_bytes() == 0);
  REQUIRE(buffer.append(pool, "hello"));
  CHECK(buffer.view() == "hello");
  CHECK(pool.taken_bytes() == 4096);
  buffer.consume(2);
  CHECK(buffer.view() == "llo");
  buffer.truncate(1);
  CHECK(buffer.view() == "l");
  buffer.consume(1);
  CHECK(pool.taken_bytes() == 0);
  REQUIRE(buffer.append(pool, "again"));
  buffer.truncate(0);
  CHECK(pool.taken_bytes() == 0);
  REQUIRE(buffer.append(pool, "again"));
  buffer.clear();
  CHECK(pool.taken_bytes() == 0);
}

TEST_CASE("a moved buffer takes its bytes along and leaves an empty one") {
  BlockPool pool;
  Buffer one, two;
  REQUIRE(one.append(pool, "one"));
  REQUIRE(two.append(pool, "twice"));
  two.consume(1);
  std::swap(one, two);
  CHECK(one.view() == "wice");
  CHECK(two.view() == "one");
  Buffer three(std::move(one));
  CHECK(three.view() == "wice");
  CHECK(one.empty());
  CHECK(one.view().empty());
  CHECK(one.room() == 0);
  two = std::move(three);
  CHECK(two.view() == "wice");
  CHECK(three.empty());
  CHECK(pool.taken_bytes() == 4096);
  REQUIRE(three.append(pool, "new"));  // and can be used again
  CHECK(three.view() == "new");
}

TEST_CASE("a buffer is a queue of bytes under any sequence of operations") {
  // Against a std::string: random appends, writes at the tail, consume() and truncate().
  std::mt19937 random(3);
  BlockPool pool;
  Buffer buffer;
  std::string model;
  for (int step = 0; step < 20'000; ++step) {
    const std::size_t n = random() % 3000;
    const std::string bytes(n, static_cast<char>('a' + step % 26));
    switch (random() % 5) {
      case 0:
      case 1:
        REQUIRE(buffer.append(pool, bytes));
        model += bytes;
        break;
      case 2:
        REQUIRE(buffer.reserve(pool, n));
        REQUIRE(buffer.room() >= n);
        std::memcpy(buffer.tail(), bytes.data(), n);
        buffer.commit(n);
        model += bytes;
        break;
      case 3:
        buffer.consume(std::min(2 * n, model.size()));
        model.erase(0, std::min(2 * n, model.size()));
        break;
      default:
        if (random() % 8 != 0) break;
        model.resize(model.size() - std::min(n, model.size()));
        buffer.truncate(model.size());
        break;
    }
    REQUIRE(buffer.view() == model);
    REQUIRE(buffer.empty() == model.empty());
  }
}
