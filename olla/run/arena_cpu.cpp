// The arena on CPU: an allocator in front of PyTorch's own, which answers planned steps with planned addresses.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include "arena.h"

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

void release(void* address);

class ArenaAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    auto& registry = olla::Registry::get();
    olla::Session* session = registry.session();
    if (session == nullptr || size == 0) return before_->allocate(size);
    if (session->recording) {
      c10::DataPtr block = before_->allocate(size);
      if (!block || block.get() != block.get_context() || block.get_deleter() != before_->raw_deleter()) return block;
      registry.note(*session, block.get(), size);
      return owned(block.release_context());
    }
    void* address = registry.replay(*session, size);
    if (address == nullptr) return before_->allocate(size);
    c10::profiledCPUMemoryReporter().New(address, size);
    return owned(address);
  }

  c10::DeleterFnPtr raw_deleter() const override { return before_->raw_deleter() ? &release : nullptr; }

  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  // The allocator that was there before: it answers whatever is not planned.
  c10::Allocator* before_ = nullptr;

 private:
  static c10::DataPtr owned(void* address) { return {address, address, &release, c10::Device(c10::DeviceType::CPU)}; }
};

ArenaAllocator& allocator() {
  static auto* allocator = new ArenaAllocator;  // never destroyed: tensors may outlive all statics
  return *allocator;
}

void release(void* address) {
  // Reported first: once it is given back, another thread may get the address.
  if (olla::Registry::get().in_arena(address)) c10::profiledCPUMemoryReporter().Delete(address);
  if (!olla::Registry::get().release(address)) allocator().before_->raw_deleter()(address);
}

}  // namespace

extern "C" {

// Puts the allocator in front, once. Returns 0 if another one was put in front of it.
int olla_install() {
  constexpr uint8_t kPriority = 100;
  if (allocator().before_ == nullptr) {
    allocator().before_ = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&allocator(), kPriority);
  }
  return c10::GetCPUAllocator() == &allocator();
}

// Null if there is not so much memory.
std::shared_ptr<olla::Arena>* olla_new_arena(size_t bytes) {
  const size_t reserved = bytes + kHugePage;
  void* memory = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  auto* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
  madvise(base, bytes, MADV_HUGEPAGE);  // fewer page faults and TLB misses; no harm if it is refused
#endif
  return new std::shared_ptr<olla::Arena>(
      std::make_shared<olla::Arena>(base, bytes, [=] { munmap(memory, reserved); }));
}
}
