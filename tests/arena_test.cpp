// Drives arena.h on host memory, as arena_cpu.cpp does inside of PyTorch. Run under sanitizers by arena_native_test.py.

#include "../olla/run/arena.h"
#include "require.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

namespace {

using Handle = std::shared_ptr<olla::Arena>;

std::atomic<int> arenas{0};

Handle* new_arena(size_t bytes) {
  auto* memory = static_cast<char*>(std::malloc(bytes));
  ++arenas;
  return new Handle(std::make_shared<olla::Arena>(memory, bytes, [=] {
    std::free(memory);
    --arenas;
  }));
}

// What an allocator does with arena.h.
void* allocate(size_t size) {
  auto& registry = olla::Registry::get();
  olla::Session* session = registry.session();
  if (session && session->arena) {
    if (void* block = registry.replay(*session, size)) return block;
    return std::malloc(size);
  }
  void* block = std::malloc(size);
  if (session) registry.note(*session, block, size);
  return block;
}

void release(void* block) {
  if (!olla::Registry::get().release(block)) std::free(block);
}

// Two ops: the first one allocates 64 and 32 bytes, the second one 64 bytes where the first were, and 16 outside.
struct Plan {
  int64_t clock = -1;
  std::vector<int64_t> start{0, 2, 4}, sizes{64, 32, 64, 16}, offsets{0, 64, 0, -1};
  olla::Slots slots{2, start.data(), sizes.data(), offsets.data()};
  Handle* arena = new_arena(96);

  olla::Session* begin() { return olla_begin_replay(&clock, arena, &slots); }
  char* base() const { return (*arena)->base; }
  ~Plan() { olla_drop_arena(arena); }
};

olla::Counts end(olla::Session* session) {
  olla::Counts counts;
  const int64_t events = olla_end(session, &counts);
  std::vector<olla::Event> seen(static_cast<size_t>(events));
  olla_drop_session(session, seen.data());
  return counts;
}

void* at(Plan& plan, int64_t position, size_t size) {
  plan.clock = position;
  void* block = allocate(size);
  std::memset(block, 7, size);
  return block;
}

void a_replay_answers_as_planned() {
  Plan plan;
  olla::Session* session = plan.begin();
  void* a = at(plan, 0, 64);
  void* b = at(plan, 0, 32);
  REQUIRE(a == plan.base() && b == plan.base() + 64);
  release(a);
  void* c = at(plan, 1, 64);
  REQUIRE(c == plan.base());
  void* d = at(plan, 1, 16);
  release(b);
  release(c);
  const olla::Counts counts = end(session);
  REQUIRE(counts.hits == 3 && counts.outside == 1 && counts.sizes == 0 && counts.conflicts == 0 && counts.escapes == 0);
  release(d);
}

void what_is_alive_is_never_overwritten() {
  Plan plan;
  olla::Session* session = plan.begin();
  void* a = at(plan, 0, 64);  // kept
  void* c = at(plan, 1, 64);
  REQUIRE(a == plan.base() && c != plan.base());
  const olla::Counts counts = end(session);
  REQUIRE(counts.conflicts == 1 && counts.escapes == 1);
  release(a);
  release(c);
}

void other_sizes_and_unknown_ops_are_missed_and_the_next_op_is_in_step_again() {
  Plan plan;
  olla::Session* session = plan.begin();
  void* early = at(plan, -1, 64);
  void* odd = at(plan, 0, 48);
  void* skipped = at(plan, 0, 32);  // the 64 bytes before it never come
  void* late = at(plan, 7, 64);
  void* c = at(plan, 1, 64);
  REQUIRE(skipped == plan.base() + 64 && c == plan.base());
  for (void* block : {early, odd, skipped, late, c}) release(block);
  const olla::Counts counts = end(session);
  REQUIRE(counts.sizes == 3 && counts.hits == 2);
}

void a_block_larger_than_the_arena_is_refused() {
  const std::unique_ptr<Handle> arena(new_arena(96));
  REQUIRE((*arena)->take(64, 33) == nullptr);
  REQUIRE((*arena)->take(64, 32) != nullptr);
  REQUIRE((*arena)->take(63, 1) != nullptr);
  REQUIRE((*arena)->take(0, 64) == nullptr);
  REQUIRE((*arena)->take(95, 1) == nullptr);
}

void an_arena_lives_as_long_as_its_blocks() {
  const int before = arenas;
  auto plan = std::make_unique<Plan>();
  olla::Session* session = plan->begin();
  void* block = at(*plan, 0, 64);
  end(session);
  plan.reset();
  REQUIRE(arenas == before + 1);
  std::memset(block, 1, 64);
  release(block);
  REQUIRE(arenas == before);
}

void sessions_nest() {
  Plan outer, inner;
  olla::Session* session = outer.begin();
  void* a = at(outer, 0, 64);
  olla::Session* nested = inner.begin();
  void* b = at(inner, 0, 64);
  REQUIRE(a == outer.base() && b == inner.base());
  release(b);
  REQUIRE(end(nested).hits == 1);
  void* c = at(outer, 0, 32);
  REQUIRE(c == outer.base() + 64);
  release(a);
  release(c);
  REQUIRE(end(session).hits == 2);
}

void a_session_that_was_left_open_ends_with_the_one_that_it_is_in() {
  Plan outer, inner;
  olla::Session* first = outer.begin();
  olla::Session* second = inner.begin();
  end(first);
  REQUIRE(olla_innermost() == nullptr);
  olla::Counts counts;
  REQUIRE(olla_end(second, &counts) == -1);
  olla_drop_session(second, nullptr);
}

void a_recording_notes_what_the_step_allocates_and_releases() {
  int64_t clock = 0;
  olla::Session* session = olla_begin_recording(&clock);
  void* a = allocate(64);
  void* b = allocate(32);
  clock = 1;
  release(a);
  std::thread([b] { release(b); }).join();
  void* kept = allocate(16);
  olla::Counts counts;
  REQUIRE(olla_end(session, &counts) == 5);
  olla::Event events[5];
  olla_drop_session(session, events);
  release(kept);
  REQUIRE(events[0].id == 0 && events[0].size == 64 && events[0].position == 0);
  REQUIRE(events[2].id == 0 && events[2].size == -1 && events[2].position == 1);
  REQUIRE(events[3].id == 1 && events[3].size == -1);
  REQUIRE(events[4].id == 2 && events[4].size == 16);
}

void threads_run_steps_of_their_own_and_release_blocks_of_others() {
  std::vector<std::thread> threads;
  std::atomic<int> failures{0};
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&failures] {
      Plan plan;
      for (int step = 0; step < 200; ++step) {
        olla::Session* session = plan.begin();
        void* a = at(plan, 0, 64);
        void* b = at(plan, 0, 32);
        std::thread([a] { release(a); }).join();
        void* c = at(plan, 1, 64);
        failures += c != plan.base() || b != plan.base() + 64;
        release(b);
        release(c);
        failures += end(session).hits != 3;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  REQUIRE(failures == 0);
}

void allocations_of_threads_without_a_step_are_counted_and_left_alone() {
  Plan plan;
  olla::Session* session = plan.begin();
  std::thread([] { release(allocate(64)); }).join();
  const olla::Counts counts = end(session);
  REQUIRE(counts.foreign == 1 && counts.hits == 0);
}

void a_child_process_has_arenas_of_its_own() {
  Plan plan;
  std::atomic<bool> stop{false};
  std::thread busy([&stop] {  // holds the mutex again and again while the process forks
    Plan other;
    while (!stop) {
      olla::Session* session = other.begin();
      release(at(other, 0, 64));
      end(session);
    }
  });
  for (int fork_number = 0; fork_number < 5; ++fork_number) {
    olla::Session* session = plan.begin();
    void* a = at(plan, 0, 64);
    const pid_t child = fork();
    if (child == 0) {
      void* b = at(plan, 0, 32);
      release(a);
      release(b);
      _exit(end(session).hits == 2 ? 0 : 1);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    release(a);
    REQUIRE(end(session).hits == 1);
  }
  stop = true;
  busy.join();
}

}  // namespace

int main(int, char** arguments) {
  a_replay_answers_as_planned();
  what_is_alive_is_never_overwritten();
  other_sizes_and_unknown_ops_are_missed_and_the_next_op_is_in_step_again();
  a_block_larger_than_the_arena_is_refused();
  an_arena_lives_as_long_as_its_blocks();
  sessions_nest();
  a_session_that_was_left_open_ends_with_the_one_that_it_is_in();
  a_recording_notes_what_the_step_allocates_and_releases();
  threads_run_steps_of_their_own_and_release_blocks_of_others();
  allocations_of_threads_without_a_step_are_counted_and_left_alone();
  if (std::string(arguments[1]) != "thread") a_child_process_has_arenas_of_its_own();  // its tool cannot fork
  REQUIRE(arenas == 0);
  std::puts("all good");
}
