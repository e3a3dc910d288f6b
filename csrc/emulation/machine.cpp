#include "machine.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace dbp::emulation {

Machine machine;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = size_t{1} << 33;  // address space kept free on both sides of an array

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

}  // namespace

// --- The host's side -------------------------------------------------------------------------

Machine::Region::~Region() { munmap(mapping, mapped); }

void* Machine::allocate(const std::string& name, const void* host, size_t bytes) {
  auto region = std::make_unique<Region>();
  region->name = name;
  region->bytes = bytes;
  region->mapped = 2 * kGuard + bytes + 4096;
  void* mapping =
      mmap(nullptr, region->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  region->mapping = static_cast<unsigned char*>(mapping);
  unsigned char* page = region->mapping + kGuard;
  if (mprotect(page, bytes + 4096, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
  region->base = page + 256 + reinterpret_cast<uintptr_t>(host) % 16;
  std::memcpy(region->base, host, bytes);
  region->writer.assign(bytes, -1);
  region->reader.assign(bytes, -1);
  regions_.push_back(std::move(region));
  return regions_.back()->base;
}

void Machine::reset(uint64_t seed, size_t shared_limit) {
  random_.seed(seed);
  shared_limit_ = shared_limit;
  recording_ = false;
  stats_ = {};
  launches_.clear();
  sites_.clear();
  left_out_.clear();
  left_out_index_ = -1;
  regions_.clear();
  last_region_ = nullptr;
}

cudaError_t Machine::launch(const std::string& kernel, const void* function, dim3 grid, dim3 block,
                            size_t shared_bytes, const void* params, size_t params_bytes,
                            std::function<void()> body) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint32_t count = block.x * block.y * block.z;
  if (blocks == 0) return cudaSuccess;
  if (grid.x > 0x7fffffffu || grid.y > 65535u || grid.z > 65535u || count == 0 || count > 1024 ||
      shared_bytes > shared_limit_)
    return cudaErrorInvalidConfiguration;
  Dl_info symbol;
  const bool named = dladdr(function, &symbol) && symbol.dli_sname;
  kernel_ = named ? symbol.dli_sname : kernel;
  launches_.push_back({kernel_, grid, block, shared_bytes,
                       std::string(static_cast<const char*>(params), params_bytes)});
  if (recording_) return cudaSuccess;
  if (count % 32) throw DeadlockFault(kernel_ + ": a block must be whole warps");

  stats_.launches++;
  grid_ = grid;
  block_ = block;
  body_ = std::move(body);
  for (auto& region : regions_) {
    std::fill(region->writer.begin(), region->writer.end(), -1);
    std::fill(region->reader.begin(), region->reader.end(), -1);
  }
  while (fibers_.size() < count) fibers_.push_back(std::make_unique<Fiber>(kStack));
  shared_.resize(shared_bytes);

  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_);
  for (int64_t number : order) run_block(number);
  return cudaSuccess;
}

// --- The block -------------------------------------------------------------------------------

void Machine::run_block(int64_t number) {
  stats_.blocks++;
  block_number_ = number;
  block_index_ = {static_cast<unsigned>(number % grid_.x),
                  static_cast<unsigned>(number / grid_.x % grid_.y),
                  static_cast<unsigned>(number / grid_.x / grid_.y)};
  const int count = static_cast<int>(block_.x * block_.y * block_.z);
  std::fill(shared_.begin(), shared_.end(), 0xff);  // NaN in every floating-point format
  cells_.assign(shared_.size() / kGranule + 1, Cell{});
  warps_.clear();
  warps_.resize(count / 32);
  threads_.assign(count, Thread{});
  ready_.resize(count);
  alive_ = count;
  waiting_ = 0;
  epoch_ = 0;
  fault_ = nullptr;
  clocks_.clear();
  readers_.clear();
  mbarriers_.clear();
  named_barriers_.clear();
  for (int t = 0; t < count; ++t) {
    const auto u = static_cast<unsigned>(t);
    threads_[t].index = {u % block_.x, u / block_.x % block_.y, u / block_.x / block_.y};
    threads_[t].state = Thread::ready;
    ready_[t] = t;
    fibers_[t]->start(fiber_main);
  }
  while (!ready_.empty()) {
    const size_t pick = random_() % ready_.size();
    current_ = ready_[pick];
    // Half of the turns end only at a barrier or the thread's end, the others after a few accesses.
    const uint64_t draw = random_();
    quantum_ = draw & 1 ? INT64_MAX : static_cast<int64_t>(1 + (draw >> 1) % 16);
    stats_.switches++;
    fibers_[current_]->enter();
    if (fault_) std::rethrow_exception(fault_);
    if (threads_[current_].state != Thread::ready) {
      // A barrier that this thread completed has appended to ready_, so pick is still its place.
      ready_[pick] = ready_.back();
      ready_.pop_back();
    }
  }
  if (alive_) {
    for (size_t w = 0; w < warps_.size(); ++w)
      if (warps_[w].arrived) {
        current_ = static_cast<int>(w * 32);
        fail<DeadlockFault>("only " + std::to_string(warps_[w].arrived) +
                            " lanes of the warp reached a warp-level operation");
      }
    fail<DeadlockFault>("threads wait for ever");
  }
}

void Machine::fiber_main() {
  Machine& m = machine;
  const int self = m.current_;
  try {
    m.body_();
    Thread& thread = m.threads_[self];
    bool unfinished = !thread.open.empty();
    for (const auto& group : thread.groups) unfinished |= !group.empty();
    if (unfinished)
      m.fail<UninitialisedRead>("the thread ends with cp.async copies it never waited for");
    Warp& warp = m.warps_[self / 32];
    if (!warp.open.empty() || !warp.groups.empty())
      m.fail<RaceFault>("the thread ends with a wgmma its warp never waited for");
    m.alive_--;
    warp.alive--;
    if (m.waiting_ && m.waiting_ == m.alive_) m.release_barrier();
  } catch (...) {
    m.fault_ = std::current_exception();
  }
  m.threads_[self].state = Thread::done;
  m.fibers_[self]->leave();
  std::abort();  // a finished fiber is never entered again
}

void Machine::block_thread() { fibers_[current_]->leave(); }

void Machine::wake(int thread) {
  threads_[thread].state = Thread::ready;
  ready_.push_back(thread);
}

// A switch between threads at an access, when the current turn is over.
void Machine::tick() {
  if (--quantum_ > 0) return;
  block_thread();
}

std::string Site::text() const {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

bool Machine::skips(const char* file, int line) {
  for (size_t i = 0; i < sites_.size(); ++i)
    if (sites_[i].file == file && sites_[i].line == line)
      return static_cast<int>(i) == left_out_index_;
  sites_.push_back({file, line});
  if (sites_.back().text() == left_out_) left_out_index_ = static_cast<int>(sites_.size()) - 1;
  return static_cast<int>(sites_.size()) - 1 == left_out_index_;
}

void Machine::barrier() {
  if (++waiting_ == alive_) {
    release_barrier();
    tick();
    return;
  }
  threads_[current_].state = Thread::at_barrier;
  block_thread();
}

void Machine::release_barrier() {
  stats_.barriers++;
  waiting_ = 0;
  epoch_++;
  for (size_t t = 0; t < threads_.size(); ++t)
    if (threads_[t].state == Thread::at_barrier) wake(static_cast<int>(t));
}

void Machine::warp(WarpOp op, void* argument, void (*act)(Machine&, void* const*)) {
  Warp& warp = warps_[current_ / 32];
  if (warp.alive < 32)
    fail<DeadlockFault>("a lane of the warp has exited before a warp-level operation");
  if (warp.arrived && warp.op != op)
    fail<DeadlockFault>("lanes of the warp are at different warp-level operations");
  warp.op = op;
  warp.arguments[current_ % 32] = argument;
  if (++warp.arrived < 32) {
    threads_[current_].state = Thread::at_warp_op;
    block_thread();
    return;
  }
  warp.arrived = 0;
  act(*this, warp.arguments);
  const int first = current_ / 32 * 32;
  for (int t = first; t < first + 32; ++t)
    if (t != current_) wake(t);
  tick();
}

void Machine::warp_barrier() {
  warp(WarpOp::sync, nullptr, [](Machine& m, void* const*) {
    m.warps_[m.current_ / 32].epoch++;
    int lanes[32];
    std::iota(lanes, lanes + 32, m.current_ / 32 * 32);
    m.meet(lanes, 32);
  });
}

// --- Global memory ---------------------------------------------------------------------------

Machine::Region& Machine::region(const void* address, size_t bytes, size_t alignment,
                                 const char* what) {
  auto* p = static_cast<const unsigned char*>(address);
  auto inside = [&](const Region& r) { return r.base <= p && p + bytes <= r.base + r.bytes; };
  if (!last_region_ || !inside(*last_region_)) {
    const Region* nearest = nullptr;
    Region* found = nullptr;
    for (auto& r : regions_) {
      if (inside(*r)) found = r.get();
      if (r->mapping <= p && p < r->mapping + r->mapped) nearest = r.get();
    }
    if (!found) {
      std::string where = "no array is near";
      if (nearest)
        where = "byte " + std::to_string(p - nearest->base) + " of '" + nearest->name +
                "', which has " + std::to_string(nearest->bytes);
      fail<MemoryFault>(std::string("global ") + what + " of " + std::to_string(bytes) +
                        " bytes out of bounds: " + where);
    }
    last_region_ = found;
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fail<MemoryFault>(std::string("misaligned global ") + what + " of " + std::to_string(bytes) +
                      " bytes, at byte " + std::to_string(p - last_region_->base) + " of '" +
                      last_region_->name + "'");
  return *last_region_;
}

void Machine::global_read(const void* address, size_t bytes, size_t alignment) {
  tick();
  Region& r = region(address, bytes, alignment, "read");
  const size_t first = static_cast<const unsigned char*>(address) - r.base;
  for (size_t i = first; i < first + bytes; ++i) {
    if (r.writer[i] >= 0 && r.writer[i] != block_number_)
      fail<RaceFault>("reads byte " + std::to_string(i) + " of '" + r.name +
                      "', which another block of the launch writes");
    r.reader[i] = block_number_;
  }
  stats_.global_read_bytes += static_cast<int64_t>(bytes);
}

void Machine::global_write(const void* address, size_t bytes, size_t alignment) {
  tick();
  Region& r = region(address, bytes, alignment, "write");
  const size_t first = static_cast<const unsigned char*>(address) - r.base;
  for (size_t i = first; i < first + bytes; ++i) {
    for (int64_t other : {r.writer[i], r.reader[i]})
      if (other >= 0 && other != block_number_)
        fail<RaceFault>("writes byte " + std::to_string(i) + " of '" + r.name +
                        "', which another block of the launch uses");
    r.writer[i] = block_number_;
  }
  stats_.global_write_bytes += static_cast<int64_t>(bytes);
}

// --- Shared memory ---------------------------------------------------------------------------

static std::string writer_text(uint16_t writer) {
  return writer & 0x8000 ? "a tensor copy" : "thread " + std::to_string(writer);
}

// What is wrong with an access to the array [begin, end) of shared memory, or nothing.
static std::string bounds_problem(uint32_t address, uint32_t bytes, uint32_t begin, uint32_t end) {
  if (address < begin || address > end || bytes > end - address)
    return "out of bounds: byte " + std::to_string(static_cast<int64_t>(address) - begin) +
           " of an array of " + std::to_string(end - begin) + " bytes at shared byte " +
           std::to_string(begin);
  else if (address % bytes)
    return "misaligned: shared byte " + std::to_string(address);
  return {};
}

const unsigned char* Machine::shared_read(uint32_t address, uint32_t bytes, uint32_t begin,
                                          uint32_t end) {
  tick();
  const auto problem = bounds_problem(address, bytes, begin, std::min(end, shared_bytes()));
  if (!problem.empty())
    fail<MemoryFault>("shared read of " + std::to_string(bytes) + " bytes " + problem);
  const auto self = static_cast<uint16_t>(current_), warp = static_cast<uint16_t>(current_ / 32);
  const uint32_t warp_epoch = warps_[warp].epoch;
  for (uint32_t c = address / kGranule; c <= (address + bytes - 1) / kGranule; ++c) {
    Cell& cell = cells_[c];
    auto at = [&] { return "reads shared byte " + std::to_string(c * kGranule); };
    if (cell.state == Cell::pending)
      fail<UninitialisedRead>(at() + " before the copy that fills it was waited for");
    if (cell.state == Cell::unwritten) fail<UninitialisedRead>(at() + ", which was never written");
    if (cell.writer != self && cell.write_epoch == epoch_ &&
        !(cell.writer / 32 == warp && cell.write_warp_epoch != warp_epoch) &&
        !knows(cell.writer, cell.write_clock))
      fail<RaceFault>(at() + ", written by " + writer_text(cell.writer) +
                      " with no barrier in between");
    note_read(c);
    if (cell.reader == kNobody || cell.read_epoch != epoch_) {
      cell.reader = self;
      cell.reader_warp = warp;
    } else {
      if (cell.reader != self) cell.reader = kSeveral;
      if (cell.reader_warp != warp) cell.reader_warp = kSeveral;
    }
    cell.read_epoch = epoch_;
    cell.read_warp_epoch = warp_epoch;
  }
  return shared_.data() + address;
}

void Machine::check_write(uint32_t address, uint32_t bytes, const char* what) {
  const auto self = static_cast<uint16_t>(current_), warp = static_cast<uint16_t>(current_ / 32);
  const uint32_t warp_epoch = warps_[warp].epoch;
  for (uint32_t c = address / kGranule; c <= (address + bytes - 1) / kGranule; ++c) {
    const Cell& cell = cells_[c];
    auto at = [&] { return std::string(what) + " shared byte " + std::to_string(c * kGranule); };
    if (cell.in_flight) fail<RaceFault>(at() + ", which a wgmma may still read");
    if (cell.state == Cell::pending && cell.writer != self)
      fail<RaceFault>(at() + ", which a copy by thread " + std::to_string(cell.writer) + " fills");
    if (cell.writer != kNobody && cell.writer != self && cell.write_epoch == epoch_ &&
        !(cell.writer / 32 == warp && cell.write_warp_epoch != warp_epoch) &&
        !knows(cell.writer, cell.write_clock))
      fail<RaceFault>(at() + ", written by " + writer_text(cell.writer) +
                      " with no barrier in between");
    bool known = clocks_on();
    if (known && cell.read_epoch == epoch_)
      for (const auto& [reader, tick] : readers_[c]) known &= reader == self || knows(reader, tick);
    if (!known && cell.reader != kNobody && cell.reader != self && cell.read_epoch == epoch_ &&
        !(cell.reader_warp == warp && cell.read_warp_epoch != warp_epoch))
      fail<RaceFault>(at() + ", read by another thread with no barrier in between");
  }
}

void Machine::mark(uint32_t address, uint32_t bytes, uint8_t state) {
  for (uint32_t c = address / kGranule; c <= (address + bytes - 1) / kGranule; ++c) {
    Cell& cell = cells_[c];
    cell.state = static_cast<decltype(cell.state)>(state);
    cell.writer = static_cast<uint16_t>(current_);
    cell.write_epoch = epoch_;
    cell.write_warp_epoch = warps_[current_ / 32].epoch;
    cell.write_clock = clocks_on() ? clock(current_, current_) : 0;
    cell.write_step = threads_[current_].step;
  }
}

unsigned char* Machine::shared_write(uint32_t address, uint32_t bytes, uint32_t begin,
                                     uint32_t end) {
  tick();
  const auto problem = bounds_problem(address, bytes, begin, std::min(end, shared_bytes()));
  if (!problem.empty())
    fail<MemoryFault>("shared write of " + std::to_string(bytes) + " bytes " + problem);
  check_write(address, bytes, "writes");
  threads_[current_].step++;
  mark(address, bytes, Cell::written);
  return shared_.data() + address;
}

// --- cp.async --------------------------------------------------------------------------------

void Machine::cp_async(uint32_t destination, const void* source, uint32_t bytes, bool valid) {
  tick();
  const auto problem = bounds_problem(destination, bytes, 0, shared_bytes());
  if (!problem.empty()) fail<MemoryFault>("cp.async to shared memory " + problem);
  if (valid) global_read(source, bytes, bytes);
  check_write(destination, bytes, "cp.async to");
  mark(destination, bytes, Cell::pending);
  std::memset(shared_.data() + destination, 0xff, bytes);
  threads_[current_].open.push_back({destination, bytes, valid ? source : nullptr});
}

void Machine::cp_async_commit() {
  Thread& thread = threads_[current_];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void Machine::cp_async_wait(size_t pending) {
  Thread& thread = threads_[current_];
  while (thread.groups.size() > pending) {
    for (const Copy& copy : thread.groups.front()) {
      unsigned char* to = shared_.data() + copy.destination;
      copy.source ? std::memcpy(to, copy.source, copy.bytes) : std::memset(to, 0, copy.bytes);
      thread.step++;
      mark(copy.destination, copy.bytes, Cell::written);
    }
    thread.groups.pop_front();
  }
}

// --- Faults ----------------------------------------------------------------------------------

std::string Machine::place() const {
  return kernel_ + ", block " + text(block_index_) + ", thread " + text(threads_[current_].index) +
         ": ";
}

}  // namespace dbp::emulation
