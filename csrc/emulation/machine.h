// A CPU stand-in for one CUDA multiprocessor. The threads of a block are fibers, run in a seeded
// random order and switched at memory accesses, barriers and warp-level operations; blocks follow
// one another in random order. Every access goes through this class, which checks
//   - bounds and alignment, in global memory and per array in shared memory;
//   - reads of shared memory nobody wrote, or whose cp.async has not been waited for;
//   - races: two threads on the same shared bytes, one writing, no barrier between them, whatever
//   the
//     schedule was; two blocks of one launch on the same global bytes, one writing;
//   - on sm_90a, operands of a wgmma changed before its wait, accumulators used before it, and
//   ordinary
//     writes that no proxy fence makes visible to it;
//   - deadlocks, and warp-level operations that not all 32 lanes reach.
// Any one barrier or wait of a kernel can be left out (see Site), to see that its absence shows.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_types.h"
#include "fiber.h"

namespace dbp::emulation {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct MemoryFault : Fault {
  using Fault::Fault;
};
struct UninitialisedRead : Fault {
  using Fault::Fault;
};
struct RaceFault : Fault {
  using Fault::Fault;
};
struct DeadlockFault : Fault {
  using Fault::Fault;
};

// What the launches since the last reset did; byte counts are those the kernel asked for.
struct Stats {
  int64_t launches = 0, blocks = 0, barriers = 0, switches = 0;
  int64_t global_read_bytes = 0, global_write_bytes = 0;
  int64_t ldmatrix_phases =
      0;  // 8 rows of 16 bytes each: one shared memory cycle if no two collide
  int64_t ldmatrix_conflicts = 0;  // further cycles because rows fall on the same banks
  int64_t mma = 0, wgmma = 0;      // per warp
};

// A launch as the kernel's launcher asked for it; params in the device's layout.
struct Launch {
  std::string kernel;  // mangled name
  dim3 grid, block;
  size_t shared_bytes;
  std::string params;
};

// A line of a kernel with a barrier or a wait.
struct Site {
  const char* file;
  int line;
  std::string text() const;  // "pack.cuh:58"
};

enum class WarpOp { sync, shuffle, ldmatrix, mma, wgmma, wgmma_fence, wgmma_commit, wgmma_wait };

// What one lane gives to a wgmma; `a` and `b` are the same in all lanes.
struct WgmmaArgument {
  char kind;  // 'b' bf16, 'h' fp16
  int columns;
  float* d;
  uint64_t a, b;
  const uint32_t* registers;  // null, or 4 that hold this lane's part of A
};

class Machine {
 public:
  // --- The host's side ---
  // A device copy of `bytes` bytes, far from every other array and as aligned as `host` is (mod
  // 16).
  void* allocate(const std::string& name, const void* host, size_t bytes);
  void reset(uint64_t seed, size_t shared_limit);
  void leave_out(const std::string& site) { left_out_ = site; }
  const std::vector<Site>& sites() const { return sites_; }
  void record_only(bool on) { recording_ = on; }
  // Of the device that is emulated: 90 for 9.0.
  void set_capability(int capability) { capability_ = capability; }
  int capability() const { return capability_; }
  cudaError_t launch(const std::string& kernel, const void* function, dim3 grid, dim3 block,
                     size_t shared_bytes, const void* params, size_t params_bytes,
                     std::function<void()> body);
  const Stats& stats() const { return stats_; }
  const std::vector<Launch>& launches() const { return launches_; }

  // --- The device's side: the running thread ---
  uint3 thread_index() const { return threads_[current_].index; }
  uint3 block_index() const { return block_index_; }
  dim3 block_size() const { return block_; }
  dim3 grid_size() const { return grid_; }
  int lane() const { return current_ % 32; }

  void global_read(const void* address, size_t bytes, size_t alignment);
  void global_write(const void* address, size_t bytes, size_t alignment);
  // Shared addresses are byte offsets; [begin, end) is the array they must lie in.
  const unsigned char* shared_read(uint32_t address, uint32_t bytes, uint32_t begin, uint32_t end);
  unsigned char* shared_write(uint32_t address, uint32_t bytes, uint32_t begin, uint32_t end);
  uint32_t shared_bytes() const { return static_cast<uint32_t>(shared_.size()); }

  // Whether the barrier or wait at this line is one to leave out; the line is noted.
  bool skips(const char* file, int line);
  void barrier();
  // Blocks until all 32 lanes of the warp have called it with the same op; the last one to arrive
  // runs act(arguments of lane 0..31).
  void warp(WarpOp op, void* argument, void (*act)(Machine&, void* const* lanes));
  void warp_barrier();
  void cp_async(uint32_t destination, const void* source, uint32_t bytes, bool valid);
  void cp_async_commit();
  void cp_async_wait(size_t pending);
  Stats& count() { return stats_; }

  // sm_90a (async.cpp)
  void mbarrier_init(uint32_t address, uint32_t count);
  void mbarrier_arrive(uint32_t address, uint32_t expected_bytes);
  void mbarrier_wait(uint32_t address, uint32_t parity);
  // Queues a copy of `bytes` to 16-byte chunks at these shared addresses.
  void tensor_copy(uint32_t mbarrier, std::vector<uint32_t> chunks,
                   std::vector<unsigned char> data);
  void named_barrier(int id, int threads);
  void fence_async_proxy();
  void wgmma(const WgmmaArgument* const* lanes);
  void wgmma_fence();
  void wgmma_commit();
  void wgmma_wait(size_t pending);

  [[noreturn]] void deadlock(const std::string& what) const { fail<DeadlockFault>(what); }
  [[noreturn]] void misaligned(const std::string& what) const { fail<MemoryFault>(what); }

 private:
  static constexpr uint16_t kNobody = 0xffff, kSeveral = 0xfffe;
  static constexpr uint16_t kMbarrier = 0x8000;  // + number: a tensor copy that it announced
  static constexpr int kMbarriers = 64;          // per block
  static constexpr uint32_t kGranule = 2;        // bytes per shadow cell

  struct Cell {  // shadow of kGranule bytes of shared memory
    enum : uint8_t { unwritten, written, pending } state = unwritten;
    uint16_t writer = kNobody, reader = kNobody, reader_warp = kNobody;
    uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
    uint32_t write_clock = 0, write_step = 0;  // see clock()
    uint16_t in_flight = 0;                    // wgmmas that may still read it
  };
  struct Region {
    std::string name;
    unsigned char *base, *mapping;
    size_t bytes, mapped;
    std::vector<int64_t> writer, reader;  // block that touched the byte in this launch, or -1
    ~Region();
  };
  struct Copy {
    uint32_t destination, bytes;
    const void* source;  // null: zeros
  };
  struct Thread {
    uint3 index;
    enum { ready, at_barrier, at_warp_op, at_mbarrier, at_named_barrier, done } state;
    std::vector<Copy> open;                // cp.async not committed yet
    std::deque<std::vector<Copy>> groups;  // committed, oldest first
    uint32_t step = 0, fenced_step = 0;    // ordinary writes, and those before the last proxy fence
  };
  struct Mbarrier {
    int number;
    uint32_t count, pending, phase = 0;
    int64_t bytes = 0;  // expected and not yet there
    int initialiser;
    uint32_t init_epoch, init_clock;
    struct TensorCopy {
      std::vector<uint32_t> chunks;
      std::vector<unsigned char> data;
    };
    std::vector<TensorCopy> copies;
    std::vector<uint32_t> collecting, completed;  // clocks of those who arrived
  };
  struct NamedBarrier {
    int threads = 0;
    std::vector<int> waiting;
  };
  struct Wgmma {
    std::vector<uint32_t> chunks;  // operands
    float* d[32];
    int columns;
    const uint32_t* registers[32];  // of A, and what they held
    uint32_t held[32][4];
  };
  struct Warp {
    WarpOp op;
    int arrived = 0, alive = 32;
    uint32_t epoch = 0;
    void* arguments[32];
    bool fenced = false;
    std::vector<Wgmma> open;
    std::deque<std::vector<Wgmma>> groups;
    std::map<float*, std::pair<std::vector<float>, int>> accumulators;  // values, wgmmas under way
  };

  static void fiber_main();
  void run_block(int64_t number);
  void block_thread();  // leaves the fiber until its thread is ready again
  void release_barrier();
  void tick();
  void wake(int thread);
  void check_write(uint32_t address, uint32_t bytes, const char* what);
  void note_read(uint32_t c);

  // Vector clocks order the threads of kernels with mbarriers or named barriers: clock(t, u) is the
  // last tick of thread (or, from threads_.size() on, mbarrier) u that t knows to be over. Between
  // two block barriers only; those order everything.
  bool clocks_on() const { return !clocks_.empty(); }
  void turn_clocks_on();
  uint32_t& clock(int t, size_t u) { return clocks_[t * width_ + u]; }
  bool knows(uint16_t writer, uint32_t tick);
  void join(std::vector<uint32_t>& into, int thread) const;
  void learn(int thread, const std::vector<uint32_t>& from);
  void meet(const int* threads, size_t count);  // a barrier among them
  Mbarrier& mbarrier_at(uint32_t address);
  void advance(Mbarrier& bar);
  void land(Mbarrier& bar);
  void wake_mbarrier_waiters();
  void finish_wgmma(Warp& warp, const Wgmma& op);
  void mark(uint32_t address, uint32_t bytes, uint8_t state);
  Region& region(const void* address, size_t bytes, size_t alignment, const char* what);
  template <class F>
  [[noreturn]] void fail(const std::string& what) const {
    throw F(place() + what);
  }
  std::string place() const;

  std::mt19937_64 random_;
  size_t shared_limit_ = 227 * 1024;
  int capability_ = 90;
  bool recording_ = false;
  Stats stats_;
  std::vector<Launch> launches_;
  std::vector<Site> sites_;
  std::string left_out_;
  int left_out_index_ = -1;
  std::vector<std::unique_ptr<Region>> regions_;
  Region* last_region_ = nullptr;

  // the launch
  std::string kernel_;
  std::function<void()> body_;
  dim3 grid_, block_;
  uint3 block_index_{};
  int64_t block_number_ = 0;

  // the block
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  int current_ = 0, alive_ = 0, waiting_ = 0;
  int64_t quantum_ = 0;
  uint32_t epoch_ = 0;
  std::vector<unsigned char> shared_;
  std::vector<Cell> cells_;
  size_t width_ = 0;
  std::vector<uint32_t> clocks_;
  std::vector<std::vector<std::pair<uint16_t, uint32_t>>> readers_;  // per cell: thread, tick
  std::map<uint32_t, Mbarrier> mbarriers_;
  std::map<int, NamedBarrier> named_barriers_;
  std::exception_ptr fault_;
};

extern Machine machine;

}  // namespace dbp::emulation
