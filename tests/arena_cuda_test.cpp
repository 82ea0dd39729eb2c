// Drives arena_cuda.cpp in front of PyTorch's real caching allocator, with device memory on the host
// (cudart_on_host.c). Built and run by native_test.py.

#include "../olla/run/arena_cuda.cpp"
#include "require.h"

#include <cstdio>
#include <cstdlib>

extern "C" int synchronizations;

namespace c10::cuda::_internal {
void setHasPrimaryContext(bool (*function)(c10::DeviceIndex));  // what PyTorch does when it loads its CUDA part
}

namespace {

using Handle = std::shared_ptr<olla::Arena>;

// Two ops: the first one allocates 1024 and 512 bytes, the second one 1024 bytes where the first were.
struct Plan {
  int64_t clock = -1;
  std::vector<int64_t> start{0, 2, 3}, sizes{1024, 512, 1024}, offsets{0, 1024, 0};
  olla::Slots slots{2, start.data(), sizes.data(), offsets.data()};
  Handle* arena = olla_new_arena(1536);

  olla::Session* begin() { return olla_begin_replay(&clock, arena, &slots); }
  char* base() const { return (*arena)->base; }
  c10::DataPtr at(int64_t position, size_t size) {
    clock = position;
    return native::get()->allocate(size);
  }
  ~Plan() { olla_drop_arena(arena); }
};

olla::Counts end(olla::Session* session) {
  olla::Counts counts;
  std::vector<olla::Event> events(static_cast<size_t>(olla_end(session, &counts)));
  olla_drop_session(session, events.data());
  return counts;
}

int64_t allocated() { return native::getDeviceStats(0).allocated_bytes[0].current; }

void a_step_is_answered_from_one_block_of_the_caching_allocator() {
  REQUIRE(allocated() == 0);
  {
    Plan plan;
    REQUIRE(allocated() == 1536);
    olla::Session* session = plan.begin();
    c10::DataPtr a = plan.at(0, 1024), b = plan.at(0, 512);
    REQUIRE(a.get() == plan.base() && b.get() == plan.base() + 1024 && a.device() == c10::Device(c10::kCUDA, 0));
    a.clear();
    c10::DataPtr c = plan.at(1, 1024);
    REQUIRE(c.get() == plan.base() && allocated() == 1536);
    b.clear(), c.clear();
    const olla::Counts counts = end(session);
    REQUIRE(counts.hits == 3 && counts.conflicts == 0 && counts.sizes == 0 && counts.escapes == 0);
  }
  REQUIRE(allocated() == 0);
}

void what_is_not_planned_is_answered_by_the_caching_allocator() {
  Plan plan;
  olla::Session* session = plan.begin();
  c10::DataPtr other = plan.at(0, 4096);
  REQUIRE(allocated() == 1536 + 4096);
  other.clear();
  REQUIRE(allocated() == 1536 && end(session).sizes == 1);
}

void a_block_that_is_kept_keeps_the_arena() {
  c10::DataPtr kept;
  {
    Plan plan;
    olla::Session* session = plan.begin();
    kept = plan.at(0, 1024);
    REQUIRE(end(session).escapes == 1);
  }
  REQUIRE(allocated() == 1536);
  kept.clear();
  REQUIRE(allocated() == 0);
}

void a_recording_notes_tensors_and_raw_workspaces() {
  int64_t clock = 0;
  olla::Session* session = olla_begin_recording(&clock);
  c10::DataPtr tensor = native::get()->allocate(1000);
  clock = 1;
  void* workspace = native::raw_alloc(300);
  native::raw_delete(workspace);
  tensor.clear();
  olla::Counts counts;
  REQUIRE(olla_end(session, &counts) == 4);
  olla::Event events[4];
  olla_drop_session(session, events);
  REQUIRE(events[0].size == 1000 && events[0].position == 0 && events[1].size == 300 && events[1].position == 1);
  REQUIRE(events[2].id == 1 && events[2].size == -1 && events[3].id == 0 && events[3].size == -1);
  REQUIRE(allocated() == 0);
}

void raw_workspaces_are_at_planned_addresses_too() {
  Plan plan;
  olla::Session* session = plan.begin();
  plan.clock = 0;
  void* workspace = native::raw_alloc_with_stream(1024, c10::cuda::getCurrentCUDAStream().stream());
  REQUIRE(workspace == plan.base());
  native::raw_delete(workspace);
  REQUIRE(end(session).hits == 1);
}

void another_stream_gets_nothing_from_the_arena() {
  Plan plan;
  olla::Session* session = plan.begin();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool());
  const c10::DataPtr elsewhere = plan.at(0, 1024);
  REQUIRE(elsewhere.get() != plan.base());
  c10::cuda::setCurrentCUDAStream(stream);
  const c10::DataPtr here = plan.at(1, 1024);
  REQUIRE(here.get() == plan.base());
  const olla::Counts counts = end(session);
  REQUIRE(counts.conflicts == 1 && counts.hits == 1);
}

void a_block_that_another_stream_uses_is_waited_for() {
  Plan plan;
  olla::Session* session = plan.begin();
  c10::DataPtr a = plan.at(0, 1024), b = plan.at(0, 512);
  native::recordStream(a, c10::cuda::getStreamFromPool());
  const int before = synchronizations;
  b.clear();
  REQUIRE(synchronizations == before);
  a.clear();
  REQUIRE(synchronizations == before + 1);
  end(session);
}

void the_private_pool_of_a_graph_is_left_alone() {
  Plan plan;
  olla::Session* session = plan.begin();
  const c10::MempoolId_t pool{0, 1};
  native::beginAllocateToPool(0, pool, [](cudaStream_t) { return true; });
  c10::DataPtr captured = plan.at(0, 1024);
  native::endAllocateToPool(0, pool);
  const c10::DataPtr planned = plan.at(0, 1024);
  REQUIRE(captured.get() != plan.base() && planned.get() == plan.base());
  captured.clear();
  native::releasePool(0, pool);
  end(session);
}

void an_arena_that_does_not_fit_is_refused() { REQUIRE(olla_new_arena(size_t{1} << 41) == nullptr); }

}  // namespace

int main() {
  c10::cuda::_internal::setHasPrimaryContext([](c10::DeviceIndex) { return true; });
  native::init(1);
  REQUIRE(olla_install() && olla_install() && native::name() == "native");
  a_step_is_answered_from_one_block_of_the_caching_allocator();
  what_is_not_planned_is_answered_by_the_caching_allocator();
  a_block_that_is_kept_keeps_the_arena();
  a_recording_notes_tensors_and_raw_workspaces();
  raw_workspaces_are_at_planned_addresses_too();
  another_stream_gets_nothing_from_the_arena();
  a_block_that_another_stream_uses_is_waited_for();
  the_private_pool_of_a_graph_is_left_alone();
  an_arena_that_does_not_fit_is_refused();
  std::puts("all good");
  std::fflush(stdout);
  std::_Exit(0);  // without the device there is nothing to shut down
}
