// Where each allocation of a planned step goes: recorded once, then answered with planned addresses.
//
// Nothing here knows torch or a device: an arena is a range of addresses, and only addresses are
// computed with. arena_cpu.cpp and arena_cuda.cpp connect it to PyTorch's allocators, and
// tests/arena_test.cpp to host memory.
//
// Safety does not rest on the plan. An address is handed out only if nothing alive is there; whatever
// does not go as recorded is answered by the allocator that was there before, and counted.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

// Everything is internal: two libraries in one process, for two devices, must not share a registry.
namespace olla {
namespace {

// How the allocations of one step were answered. The order is that of `Counts` in arena.py.
struct Counts {
  int64_t hits = 0;       // at the planned address
  int64_t outside = 0;    // planned to be outside of the arena: what outlives the step
  int64_t sizes = 0;      // missed: another size than recorded
  int64_t conflicts = 0;  // missed: something alive is there
  int64_t escapes = 0;    // still alive in the arena when the step ended
  int64_t foreign = 0;    // made by threads that run no step, meanwhile
};

// One allocation (size >= 0) or release (size < 0) while a step was recorded.
struct Event {
  int64_t id;        // of the allocation; the first one is 0
  int64_t position;  // of the op that ran
  int64_t size;
  int64_t address;
};

// A range of addresses and what is alive in it. `released` runs when the owner and all blocks are gone.
class Arena {
 public:
  Arena(char* base, size_t bytes, std::function<void()> released, int64_t place = 0)
      : base(base), bytes(bytes), place(place), released_(std::move(released)) {}
  ~Arena() { released_(); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The address at `offset`, or null if bytes of [offset, offset + size) are in use or do not exist.
  void* take(size_t offset, size_t size) {
    if (offset + size > bytes) return nullptr;
    const auto above = live_.lower_bound(offset);
    if (above != live_.end() && above->first < offset + size) return nullptr;
    if (above != live_.begin() && std::prev(above)->second > offset) return nullptr;
    live_.emplace_hint(above, offset, offset + size);
    return base + offset;
  }

  void give_back(void* block) { live_.erase(static_cast<char*>(block) - base); }

  int64_t alive() const { return static_cast<int64_t>(live_.size()); }

  char* const base;
  const size_t bytes;
  const int64_t place;  // where it may be used, if not everywhere: a stream of a device

 private:
  std::map<size_t, size_t> live_;  // first byte -> byte after the last
  std::function<void()> released_;
};

struct Recording {
  std::vector<Event> events;
  bool open = true;
  int64_t next = 0;
};

// What a replayed step expects: slots start[p] .. start[p + 1] - 1 are the allocations of the op at position p.
struct Slots {
  int64_t positions;
  const int64_t* start;
  const int64_t* sizes;
  const int64_t* offsets;  // negative: outside of the arena
};

// One run of a step on one thread. `clock` is written by the step: the position of the op that runs.
struct Session {
  const int64_t* clock;
  std::shared_ptr<Recording> recording;  // a session records,
  std::shared_ptr<Arena> arena;          // or replays
  Slots slots{};
  Counts counts{};
  int64_t position = -1;  // of the op that allocated last, and its next slot
  int64_t next = 0;
  int64_t foreign_before = 0;
  Session* outer = nullptr;
};

class Registry {
 public:
  static Registry& get() {
    static Registry* registry = new Registry;  // never destroyed: blocks may outlive all statics
    return *registry;
  }

  // The session that runs on this thread, or null. Counts an allocation of a thread without one.
  Session* session() {
    if (current_ == nullptr && open_.load(std::memory_order_relaxed) > 0)
      foreign_.fetch_add(1, std::memory_order_relaxed);
    return current_;
  }

  static Session* innermost() { return current_; }

  void begin(Session* session) {
    session->outer = current_;
    session->foreign_before = foreign_.load();
    current_ = session;
    open_.fetch_add(1);
  }

  // Ends a session of this thread. Returns whether it was one.
  bool end(Session* session) {
    if (!pause(session)) return false;
    session->counts.foreign = foreign_.load() - session->foreign_before;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (session->recording) session->recording->open = false;
    if (session->arena) session->counts.escapes = session->arena->alive();
    return true;
  }

  // Takes a session off this thread, and those that began in it and were never ended; it may begin again, on any.
  bool pause(const Session* session) {
    const Session* found = current_;
    while (found != nullptr && found != session) found = found->outer;
    if (found == nullptr) return false;
    const Session* left = nullptr;
    do {
      left = std::exchange(current_, current_->outer);
      open_.fetch_sub(1);
    } while (left != session);
    return true;
  }

  // Notes no more of what was recorded in a session that is paused.
  void close(const Session& session) {
    const std::lock_guard<std::mutex> lock(mutex_);
    session.recording->open = false;
  }

  // The planned address for an allocation of `size` bytes, or null: another allocator must answer.
  void* replay(Session& session, size_t size, int64_t place = 0) {
    const auto offset = planned(session, static_cast<int64_t>(size));
    if (!offset) return nullptr;
    if (place != session.arena->place) {
      ++session.counts.conflicts;
      return nullptr;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    void* block = session.arena->take(static_cast<size_t>(*offset), size);
    ++(block ? session.counts.hits : session.counts.conflicts);
    if (block) blocks_.emplace(block, Block{session.arena, nullptr, 0});
    return block;
  }

  // Notes an allocation that another allocator has answered, in a session that records.
  void note(Session& session, void* block, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Recording& recording = *session.recording;
    const int64_t id = recording.next++;
    recording.events.push_back(
        {id, *session.clock, static_cast<int64_t>(size), reinterpret_cast<int64_t>(block)});
    blocks_.insert_or_assign(block, Block{nullptr, session.recording, id});
  }

  // Forgets a block. Returns whether it lay in an arena; if not, its allocator has to release it.
  bool release(void* address) {
    Block block;  // destroyed after the lock: it may be the last of its arena
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(address);
    if (found == blocks_.end()) return false;
    block = std::move(found->second);
    blocks_.erase(found);
    if (block.arena) {
      block.arena->give_back(address);
      return true;
    }
    if (block.recording->open) {
      const bool own = current_ && current_->recording == block.recording;
      const int64_t position = own ? *current_->clock : -1;
      block.recording->events.push_back({block.id, position, -1, reinterpret_cast<int64_t>(address)});
    }
    return false;
  }

  bool in_arena(void* address) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(address);
    return found != blocks_.end() && found->second.arena;
  }

 private:
  struct Block {
    std::shared_ptr<Arena> arena;
    std::shared_ptr<Recording> recording;
    int64_t id = 0;
  };

  Registry() {
    // A child process must not inherit a mutex that another thread of the parent holds.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
  }

  // The offset of the next slot of this op that has this size. Slots in between are skipped.
  static std::optional<int64_t> planned(Session& session, int64_t size) {
    const Slots& slots = session.slots;
    const int64_t position = *session.clock;
    if (position >= 0 && position < slots.positions) {
      if (position != session.position) {
        session.position = position;
        session.next = slots.start[position];
      }
      for (int64_t slot = session.next; slot < slots.start[position + 1]; ++slot) {
        if (slots.sizes[slot] != size) continue;
        session.next = slot + 1;
        if (slots.offsets[slot] >= 0) return slots.offsets[slot];
        ++session.counts.outside;
        return std::nullopt;
      }
    }
    ++session.counts.sizes;
    return std::nullopt;
  }

  inline static thread_local Session* current_ = nullptr;
  std::mutex mutex_;  // guards blocks_ and what is alive in every arena
  std::unordered_map<void*, Block> blocks_;
  std::atomic<int> open_{0};
  std::atomic<int64_t> foreign_{0};
};

}  // namespace
}  // namespace olla

// ---------------------------------------------------------------------------------- the C interface
//
// For arena.py, the same for all devices; the one source file that includes this defines, beside it,
// `olla_install` and `olla_new_arena`. Sessions end in the reverse order of their beginning; one that was left open, by a
// signal, ends with the one that it began in.

extern "C" {

void olla_drop_arena(std::shared_ptr<olla::Arena>* arena) { delete arena; }

void* olla_arena_base(const std::shared_ptr<olla::Arena>* arena) { return (*arena)->base; }

olla::Session* olla_begin_recording(const int64_t* clock) {
  auto* session = new olla::Session{clock, std::make_shared<olla::Recording>(), nullptr};
  olla::Registry::get().begin(session);
  return session;
}

olla::Session* olla_begin_replay(
    const int64_t* clock, const std::shared_ptr<olla::Arena>* arena, const olla::Slots* slots) {
  auto* session = new olla::Session{clock, nullptr, *arena, *slots};
  olla::Registry::get().begin(session);
  return session;
}

// The session that runs on this thread, or null.
olla::Session* olla_innermost() { return olla::Registry::innermost(); }

// Ends the session and says how many events it recorded; -1: it is not one of this thread, and must not be dropped.
int64_t olla_end(olla::Session* session, olla::Counts* counts) {
  if (!olla::Registry::get().end(session)) return -1;
  *counts = session->counts;
  return session->recording ? static_cast<int64_t>(session->recording->events.size()) : 0;
}

// A recording of what runs in parts: between them, only releases are noted, and any thread may go on.
void olla_pause(olla::Session* session) { olla::Registry::get().pause(session); }

void olla_resume(olla::Session* session) { olla::Registry::get().begin(session); }

// Forgets a recording that is paused.
void olla_abandon(olla::Session* session) {
  olla::Registry::get().close(*session);
  delete session;
}

// Writes the events of an ended session, and forgets it.
void olla_drop_session(olla::Session* session, olla::Event* events) {
  if (session->recording) std::copy(session->recording->events.begin(), session->recording->events.end(), events);
  delete session;
}
}
