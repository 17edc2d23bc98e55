// page_shelf.h
// Owns:     rendered pages while clients are sent them, and the memory of one that all its clients have let go of.
// Promises: a page is handed over without a copy, and its memory comes home to be written anew: the first touch of
//           fresh memory costs more than all that is written into it. At most one page lies on the shelf.
// Leaves:   what a page says to its writer, when a client lets go of it to own_answers.h.
// Threads:  lend() and take_back() one (control); the last to let go of a page, and of the shelf, may be any.
#pragma once

#include <atomic>
#include <memory>

#include "page.h"

namespace nexus {

class PageShelf {
 public:
  // Hands over what was written; `page` has no memory then. Throws std::bad_alloc, and the text is lost.
  std::shared_ptr<const Page> lend(Page& page) {
    auto lent = std::make_unique<Page>();
    lent->swap(page);
    return {lent.release(), [home = home_](const Page* back) { home->put(const_cast<Page*>(back)); }};
  }

  // Gives `page` the memory that came home, if some did, and an empty text.
  void take_back(Page& page) {
    page.clear();
    const std::unique_ptr<Page> back = home_->take();
    if (back == nullptr) return;
    back->clear();
    back->swap(page);
  }

 private:
  class Home {
   public:
    Home() = default;
    Home(const Home&) = delete;
    Home& operator=(const Home&) = delete;
    ~Home() { put(nullptr); }

    std::unique_ptr<Page> take() { return std::unique_ptr<Page>(page_.exchange(nullptr, std::memory_order_acquire)); }
    // In the place of what lay there. Whoever takes it sees that the others have read it.
    void put(Page* page) { delete page_.exchange(page, std::memory_order_acq_rel); }

   private:
    std::atomic<Page*> page_{nullptr};
  };

  std::shared_ptr<Home> home_ = std::make_shared<Home>();  // outlives this where a client still reads
};

}  // namespace nexus
