#include "nexus/base/text_buffer.h"

#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <thread>

using nexus::BufferRecycler;
using nexus::TextBuffer;

TEST_CASE("a page is handed over without a copy, and its memory comes home") {
  BufferRecycler shelf;
  TextBuffer page;
  page.add("one");
  const char* const memory = page.data();
  auto lent = shelf.lend(page);
  CHECK(lent->text() == "one");
  CHECK(lent->data() == memory);
  CHECK(page.size() == 0);
  lent.reset();
  shelf.take_back(page);
  CHECK(page.size() == 0);
  page.add("two");
  CHECK(page.data() == memory);
}

TEST_CASE("a page that is still being read stays as it is while the next one is written") {
  BufferRecycler shelf;
  TextBuffer page;
  page.add("one");
  const auto first = shelf.lend(page);
  shelf.take_back(page);
  page.add("two");
  const auto second = shelf.lend(page);
  CHECK(first->text() == "one");
  CHECK(second->text() == "two");
}

TEST_CASE("a page that nobody was given keeps its memory for the next text") {
  BufferRecycler shelf;
  TextBuffer page;
  page.add("one");
  const char* const memory = page.data();
  shelf.take_back(page);
  CHECK(page.size() == 0);
  page.add("two");
  CHECK(page.data() == memory);
}

TEST_CASE("a page may be let go of on another thread, and after the shelf") {
  auto shelf = std::make_unique<BufferRecycler>();
  TextBuffer page;
  page.add(std::string(100'000, 'x'));
  auto one = shelf->lend(page);
  page.add(std::string(100'000, 'y'));
  auto other = shelf->lend(page);
  std::thread reader([lent = std::move(one)]() mutable {
    CHECK(lent->text() == std::string(100'000, 'x'));
    lent.reset();
  });
  shelf->take_back(page);  // the first one, or none
  page.add("z");
  reader.join();
  shelf.reset();
  CHECK(other->text() == std::string(100'000, 'y'));
}
