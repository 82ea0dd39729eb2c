// The arena on CUDA: PyTorch's caching allocator with planned steps answered at planned addresses.
//
// An arena is one block of the caching allocator, so all its statistics hold. It belongs to the stream
// that was current when it was made; allocations on other streams, on other devices, or into the
// private pools of CUDA graphs are left to the caching allocator. Within one stream, memory may be
// used again as soon as it was released, as the caching allocator does: kernels run in order.

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/headeronly/version.h>

#include "arena.h"

namespace {

namespace native = c10::cuda::CUDACachingAllocator;

void release(void* address);

// The stream that is current on this thread, its device included.
int64_t current_place() {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  return static_cast<int64_t>(stream.id()) * 256 + stream.device_index();
}

class ArenaAllocator final : public native::CUDAAllocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    olla::Session* session = session_for(size);
    if (void* address = replayed(session, size)) return owned(address);
    c10::DataPtr block = before_->allocate(size);
    if (session == nullptr || !session->recording || block.get() != block.get_context()) return block;
    olla::Registry::get().note(*session, block.get(), size);
    return owned(block.release_context());
  }

  void* raw_alloc(size_t size) override {
    olla::Session* session = session_for(size);
    if (void* address = replayed(session, size)) return address;
    void* address = before_->raw_alloc(size);
    if (session && session->recording) olla::Registry::get().note(*session, address, size);
    return address;
  }

  void* raw_alloc_with_stream(size_t size, cudaStream_t stream) override {
    const bool current = stream == c10::cuda::getCurrentCUDAStream().stream();
    return current ? raw_alloc(size) : before_->raw_alloc_with_stream(size, stream);
  }

  void raw_delete(void* address) override { release(address); }

  // Another stream uses a block of an arena: before it is used again, the work of that stream must be done.
  // The caching allocator has events for this. An arena waits, which is slow, and always right.
  void recordStream(const c10::DataPtr& block, c10::cuda::CUDAStream stream) override {
    if (!olla::Registry::get().in_arena(block.get())) return before_->recordStream(block, stream);
    const std::lock_guard<std::mutex> lock(mutex_);
    users_.emplace(block.get(), stream);
  }

  void wait_for_users(void* address) {
    std::vector<c10::cuda::CUDAStream> streams;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto [first, last] = users_.equal_range(address);
      for (auto user = first; user != last; ++user) streams.push_back(user->second);
      users_.erase(first, last);
    }
    for (const auto& stream : streams) stream.synchronize();
  }

  // All the rest is the caching allocator's; what newer versions of PyTorch have added stands last.

  void copy_data(void* to, const void* from, size_t size) const override { before_->copy_data(to, from, size); }
  c10::DeleterFnPtr raw_deleter() const override { return before_->raw_deleter(); }
  bool initialized() override { return before_->initialized(); }
  void emptyCache(c10::MempoolId_t pool) override { before_->emptyCache(pool); }
  native::DeviceStats getDeviceStats(c10::DeviceIndex device) override { return before_->getDeviceStats(device); }
  void resetAccumulatedStats(c10::DeviceIndex device) override { before_->resetAccumulatedStats(device); }
  void resetPeakStats(c10::DeviceIndex device) override { before_->resetPeakStats(device); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override { return before_->getMemoryInfo(device); }
  void init(int count) override { before_->init(count); }
  double getMemoryFraction(c10::DeviceIndex device) override { return before_->getMemoryFraction(device); }
  void setMemoryFraction(double share, c10::DeviceIndex device) override { before_->setMemoryFraction(share, device); }
  std::vector<native::StreamSegmentSize> getExpandableSegmentSizes(c10::DeviceIndex device) override {
    return before_->getExpandableSegmentSizes(device);
  }
  void enable(bool value) override { before_->enable(value); }
  bool isEnabled() const override { return before_->isEnabled(); }
  void cacheInfo(c10::DeviceIndex device, size_t* largest) override { before_->cacheInfo(device, largest); }
  void* getBaseAllocation(void* address, size_t* size) override { return before_->getBaseAllocation(address, size); }
  native::SnapshotInfo snapshot(c10::MempoolId_t pool, bool traces) override { return before_->snapshot(pool, traces); }
  void beginAllocateToPool(
      c10::DeviceIndex device, c10::MempoolId_t pool, std::function<bool(cudaStream_t)> filter) override {
    ++pools_;
    before_->beginAllocateToPool(device, pool, std::move(filter));
  }
  void endAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t pool) override {
    --pools_;
    before_->endAllocateToPool(device, pool);
  }
  void releasePool(c10::DeviceIndex device, c10::MempoolId_t pool) override { before_->releasePool(device, pool); }
  int getPoolUseCount(c10::DeviceIndex device, c10::MempoolId_t pool) override {
    return before_->getPoolUseCount(device, pool);
  }
  void createOrIncrefPool(
      c10::DeviceIndex device, c10::MempoolId_t pool, std::shared_ptr<native::CUDAAllocator> own) override {
    before_->createOrIncrefPool(device, pool, std::move(own));
  }
  void setUseOnOOM(c10::DeviceIndex device, c10::MempoolId_t pool, bool use) override {
    before_->setUseOnOOM(device, pool, use);
  }
  void setNoSplit(c10::DeviceIndex device, c10::MempoolId_t pool) override { before_->setNoSplit(device, pool); }
  bool checkPoolLiveAllocations(
      c10::DeviceIndex device, c10::MempoolId_t pool, const std::unordered_set<void*>& expected) override {
    return before_->checkPoolLiveAllocations(device, pool, expected);
  }
  native::ShareableHandle shareIpcHandle(void* address) override { return before_->shareIpcHandle(address); }
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override { return before_->getIpcDevPtr(std::move(handle)); }
  bool isHistoryEnabled() override { return before_->isHistoryEnabled(); }
  void recordHistory(
      bool enabled, native::CreateContextFn recorder, size_t entries, native::RecordContext when, bool clear,
      const std::vector<std::string>& skip) override {
    before_->recordHistory(enabled, recorder, entries, when, clear, skip);
  }
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& notes) override {
    before_->recordAnnotation(notes);
  }
  void pushCompileContext(std::string& context) override { before_->pushCompileContext(context); }
  void popCompileContext() override { before_->popCompileContext(); }
  void setUserMetadata(const std::string& metadata) override { before_->setUserMetadata(metadata); }
  std::string getUserMetadata() override { return before_->getUserMetadata(); }
  void attachOutOfMemoryObserver(native::OutOfMemoryObserver observer) override {
    before_->attachOutOfMemoryObserver(std::move(observer));
  }
  void attachAllocatorTraceTracker(native::AllocatorTraceTracker tracker) override {
    before_->attachAllocatorTraceTracker(std::move(tracker));
  }
  void enablePeerAccess(c10::DeviceIndex device, c10::DeviceIndex to) override { before_->enablePeerAccess(device, to); }
  cudaError_t memcpyAsync(
      void* to, int to_device, const void* from, int from_device, size_t size, cudaStream_t stream, bool p2p) override {
    return before_->memcpyAsync(to, to_device, from, from_device, size, stream, p2p);
  }
  std::shared_ptr<native::AllocatorState> getCheckpointState(c10::DeviceIndex device, c10::MempoolId_t pool) override {
    return before_->getCheckpointState(device, pool);
  }
  native::CheckpointDelta setCheckpointPoolState(
      c10::DeviceIndex device, std::shared_ptr<native::AllocatorState> state) override {
    return before_->setCheckpointPoolState(device, std::move(state));
  }
  std::string name() override { return before_->name(); }
#if TORCH_VERSION_MINOR >= 12
  std::shared_ptr<c10::GatheredContext> getContextForPointer(const void* address) override {
    return before_->getContextForPointer(address);
  }
  void attachOomRejectionObserver(native::OomRejectionObserver observer) override {
    before_->attachOomRejectionObserver(std::move(observer));
  }
#endif
#if TORCH_VERSION_MINOR >= 13
  void markCaptureBegin(c10::DeviceIndex device) override { before_->markCaptureBegin(device); }
  void markCaptureEnd(c10::DeviceIndex device) override { before_->markCaptureEnd(device); }
  c10::DataPtr allocateWithAddress(size_t size, void* address) override {
    return before_->allocateWithAddress(size, address);
  }
#endif
#if TORCH_VERSION_MINOR >= 14
  bool supportsUserMetadata() override { return before_->supportsUserMetadata(); }
  void annotateMemory(const void* address, const std::string& metadata) override {
    before_->annotateMemory(address, metadata);
  }
#endif

  native::CUDAAllocator* before_ = nullptr;

 private:
  // The session of this thread, unless the allocation goes into the private pool of a CUDA graph.
  olla::Session* session_for(size_t size) const {
    olla::Session* session = olla::Registry::get().session();
    return size == 0 || pools_.load(std::memory_order_relaxed) > 0 ? nullptr : session;
  }

  static void* replayed(olla::Session* session, size_t size) {
    if (session == nullptr || !session->arena) return nullptr;
    return olla::Registry::get().replay(*session, size, current_place());
  }

  static c10::DataPtr owned(void* address) {
    return {address, address, &release, c10::Device(c10::DeviceType::CUDA, c10::cuda::current_device())};
  }

  std::atomic<int> pools_{0};
  std::mutex mutex_;  // guards users_
  std::unordered_multimap<void*, c10::cuda::CUDAStream> users_;  // blocks of arenas, and other streams that use them
};

ArenaAllocator& allocator() {
  static auto* allocator = new ArenaAllocator;  // never destroyed: tensors may outlive all statics
  return *allocator;
}

void release(void* address) {
  if (olla::Registry::get().in_arena(address)) allocator().wait_for_users(address);
  if (!olla::Registry::get().release(address)) allocator().before_->raw_delete(address);
}

}  // namespace

extern "C" {

// Puts the allocator in front of the caching allocator, once. Returns 0 if another one is in the way.
int olla_install() {
  constexpr uint8_t kPriority = 100;
  if (allocator().before_ == nullptr) {
    allocator().before_ = native::get();
    native::allocator.store(&allocator());
    c10::SetAllocator(c10::DeviceType::CUDA, &allocator(), kPriority);
  }
  return native::get() == &allocator();
}

// On the current device and stream. Null if there is not so much memory.
std::shared_ptr<olla::Arena>* olla_new_arena(size_t bytes) {
  try {
    auto* base = static_cast<char*>(allocator().before_->raw_alloc(bytes));
    return new std::shared_ptr<olla::Arena>(std::make_shared<olla::Arena>(
        base, bytes, [base] { allocator().before_->raw_delete(base); }, current_place()));
  } catch (const c10::OutOfMemoryError&) {
    return nullptr;
  }
}
}
