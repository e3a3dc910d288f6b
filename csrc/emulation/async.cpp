// The asynchronous half of sm_90a: mbarriers, tensor copies, named barriers, wgmma, and the vector
// clocks that tell which threads these order.
#include <algorithm>

#include "machine.h"
#include "simt.h"
#include "sm90.h"

namespace dbp::emulation {

// --- Vector clocks ---------------------------------------------------------------------------

void Machine::turn_clocks_on() {
  if (clocks_on()) return;
  width_ = threads_.size() + kMbarriers;
  clocks_.assign(threads_.size() * width_, 0);
  readers_.resize(cells_.size());
  for (size_t t = 0; t < threads_.size(); ++t) clock(static_cast<int>(t), t) = 1;
}

bool Machine::knows(uint16_t writer, uint32_t tick) {
  if (!clocks_on()) return false;
  const size_t u = writer & kMbarrier ? threads_.size() + (writer - kMbarrier) : writer;
  return clock(current_, u) >= tick;
}

void Machine::note_read(uint32_t c) {
  if (!clocks_on()) return;
  auto& readers = readers_[c];
  if (cells_[c].read_epoch != epoch_) readers.clear();
  const auto self = static_cast<uint16_t>(current_);
  for (auto& [reader, tick] : readers)
    if (reader == self) {
      tick = clock(current_, current_);
      return;
    }
  readers.emplace_back(self, clock(current_, current_));
}

void Machine::join(std::vector<uint32_t>& into, int thread) const {
  into.resize(width_, 0);
  for (size_t u = 0; u < width_; ++u) into[u] = std::max(into[u], clocks_[thread * width_ + u]);
}

void Machine::learn(int thread, const std::vector<uint32_t>& from) {
  for (size_t u = 0; u < from.size(); ++u) clock(thread, u) = std::max(clock(thread, u), from[u]);
}

void Machine::meet(const int* threads, size_t count) {
  if (!clocks_on()) return;
  std::vector<uint32_t> all;
  for (size_t i = 0; i < count; ++i) join(all, threads[i]);
  for (size_t i = 0; i < count; ++i) {
    learn(threads[i], all);
    clock(threads[i], threads[i])++;
  }
}

// --- mbarriers -------------------------------------------------------------------------------

void Machine::mbarrier_init(uint32_t address, uint32_t count) {
  turn_clocks_on();
  shared_write(address, 8, 0, UINT32_MAX);
  if (count == 0) fail<DeadlockFault>("an mbarrier for no arrivals");
  if (mbarriers_.count(address)) fail<RaceFault>("initialises an mbarrier a second time");
  if (mbarriers_.size() == kMbarriers) fail<MemoryFault>("too many mbarriers for the emulation");
  Mbarrier bar{};
  bar.number = static_cast<int>(mbarriers_.size());
  bar.count = bar.pending = count;
  bar.initialiser = current_;
  bar.init_epoch = epoch_;
  bar.init_clock = clock(current_, current_);
  mbarriers_.emplace(address, std::move(bar));
}

Machine::Mbarrier& Machine::mbarrier_at(uint32_t address) {
  tick();
  auto found = mbarriers_.find(address);
  const std::string at = "shared byte " + std::to_string(address);
  if (found == mbarriers_.end()) fail<UninitialisedRead>("no mbarrier was initialised at " + at);
  const Mbarrier& bar = found->second;
  if (bar.initialiser != current_ && bar.init_epoch == epoch_ &&
      !knows(static_cast<uint16_t>(bar.initialiser), bar.init_clock))
    fail<RaceFault>("uses the mbarrier at " + at + " with no barrier after its initialisation");
  return found->second;
}

void Machine::advance(Mbarrier& bar) {
  if (bar.pending || bar.bytes) return;
  bar.phase++;
  bar.pending = bar.count;
  for (size_t u = 0; u < width_ && u < bar.collecting.size(); ++u) {
    bar.completed.resize(width_, 0);
    bar.completed[u] = std::max(bar.completed[u], bar.collecting[u]);
  }
  // who waits for the phase also sees what its copies wrote
  bar.completed.resize(width_, 0);
  bar.completed[threads_.size() + bar.number] = bar.phase;
  bar.collecting.clear();
  wake_mbarrier_waiters();
}

void Machine::wake_mbarrier_waiters() {
  for (size_t t = 0; t < threads_.size(); ++t)
    if (threads_[t].state == Thread::at_mbarrier) wake(static_cast<int>(t));
}

void Machine::mbarrier_arrive(uint32_t address, uint32_t expected_bytes) {
  Mbarrier& bar = mbarrier_at(address);
  bar.bytes += expected_bytes;
  join(bar.collecting, current_);
  clock(current_, current_)++;
  bar.pending--;
  advance(bar);
  wake_mbarrier_waiters();
}

// The copies announced so far arrive.
void Machine::land(Mbarrier& bar) {
  auto copies = std::move(bar.copies);
  bar.copies.clear();
  for (const auto& copy : copies) {
    for (size_t i = 0; i < copy.chunks.size(); ++i) {
      std::memcpy(shared_.data() + copy.chunks[i], copy.data.data() + 16 * i, 16);
      for (uint32_t c = copy.chunks[i] / kGranule; c < (copy.chunks[i] + 16) / kGranule; ++c) {
        Cell& cell = cells_[c];
        cell.state = Cell::written;
        cell.writer = static_cast<uint16_t>(kMbarrier + bar.number);
        cell.write_epoch = epoch_;
        cell.write_clock = bar.phase + 1;
      }
    }
    bar.bytes -= static_cast<int64_t>(copy.data.size());
    advance(bar);
  }
}

void Machine::mbarrier_wait(uint32_t address, uint32_t parity) {
  Mbarrier& bar = mbarrier_at(address);
  while (true) {
    land(bar);
    if ((bar.phase & 1) != (parity & 1)) break;
    threads_[current_].state = Thread::at_mbarrier;
    block_thread();
  }
  learn(current_, bar.completed);
}

void Machine::tensor_copy(uint32_t address, std::vector<uint32_t> chunks,
                          std::vector<unsigned char> data) {
  Mbarrier& bar = mbarrier_at(address);
  for (uint32_t chunk : chunks) {
    if (chunk + 16 > shared_bytes())
      fail<MemoryFault>("tensor copy to shared byte " + std::to_string(chunk) + " of " +
                        std::to_string(shared_bytes()));
    if (cells_[chunk / kGranule].state == Cell::pending)
      fail<RaceFault>("tensor copy to shared byte " + std::to_string(chunk) +
                      ", which another copy fills");
    check_write(chunk, 16, "tensor copy to");
    mark(chunk, 16, Cell::pending);
    std::memset(shared_.data() + chunk, 0xff, 16);
  }
  bar.copies.push_back({std::move(chunks), std::move(data)});
  wake_mbarrier_waiters();
}

// --- Named barriers and fences ---------------------------------------------------------------

void Machine::named_barrier(int id, int threads) {
  turn_clocks_on();
  if (id < 1 || id > 15 || threads < 32 || threads % 32)
    fail<DeadlockFault>("named barrier " + std::to_string(id) + " of " + std::to_string(threads) +
                        " threads");
  NamedBarrier& bar = named_barriers_[id];
  if (!bar.waiting.empty() && bar.threads != threads)
    fail<DeadlockFault>("threads disagree about the size of named barrier " + std::to_string(id));
  bar.threads = threads;
  bar.waiting.push_back(current_);
  if (static_cast<int>(bar.waiting.size()) < threads) {
    threads_[current_].state = Thread::at_named_barrier;
    block_thread();
    return;
  }
  const auto together = std::move(bar.waiting);
  bar.waiting.clear();
  meet(together.data(), together.size());
  for (int t : together)
    if (t != current_) wake(t);
  stats_.barriers++;
  tick();
}

void Machine::fence_async_proxy() { threads_[current_].fenced_step = threads_[current_].step; }

// --- wgmma -----------------------------------------------------------------------------------

namespace {

// Of an operand with rows along M or N: the shared address of the 16-byte chunk `column` of row k.
uint32_t chunk_address(uint64_t descriptor, uint32_t column, uint32_t k) {
  auto field = [&](int low) { return static_cast<uint32_t>(descriptor >> low & 0x3fff) << 4; };
  const uint32_t start = field(0), next_columns = field(16), next_rows = field(32);
  const auto code = static_cast<unsigned>(descriptor >> 62);
  if (code == 0)
    return start + column * next_rows + k % 8 * 16 + k / 8 * next_columns;  // roles as in PTX
  const uint32_t row = code == 1 ? 128 : code == 2 ? 64 : 32, per_row = row / 16;
  const uint32_t at = start + column % per_row * 16 + column / per_row * next_columns +
                      k % 8 * row + k / 8 * next_rows;
  return at ^ (at >> 7 & (per_row - 1)) << 4;
}

}  // namespace

// One warp's 16 rows of the product. Computed now, handed over by wgmma_wait.
void Machine::wgmma(const WgmmaArgument* const* lanes) {
  Warp& warp = warps_[current_ / 32];
  const WgmmaArgument& first = *lanes[0];
  for (int lane = 0; lane < 32; ++lane)
    if (lanes[lane]->a != first.a || lanes[lane]->b != first.b || lanes[lane]->kind != first.kind ||
        lanes[lane]->columns != first.columns)
      fail<DeadlockFault>("lanes of the warp call different wgmmas");
  if (!warp.fenced) fail<RaceFault>("wgmma without a wgmma_fence before its group");
  stats_.wgmma++;

  Wgmma op{};
  op.columns = first.columns;
  auto operand = [&](uint64_t descriptor, int from, int count, std::vector<double>& out) {
    out.resize(16 * count);
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < count; column += 8) {
        const uint32_t at = chunk_address(descriptor, (from + column) / 8, k);
        uint16_t bits[8];
        std::memcpy(bits, shared_read(at, 16, 0, UINT32_MAX), 16);
        for (uint32_t c = at / kGranule; c < (at + 16) / kGranule; ++c) {
          const Cell& cell = cells_[c];
          if (!(cell.writer & kMbarrier) && cell.write_step > threads_[cell.writer].fenced_step)
            fail<RaceFault>("wgmma reads shared byte " + std::to_string(c * kGranule) +
                            ", which thread " + std::to_string(cell.writer) +
                            " wrote without a proxy fence");
          cells_[c].in_flight++;
        }
        op.chunks.push_back(at);
        for (int e = 0; e < 8; ++e)
          out[k * count + column + e] =
              first.kind == 'b' ? bf16_to_float(bits[e]) : fp16_to_float(bits[e]);
      }
  };
  // A from registers, laid out as the left operand of an m16n8k16 mma.
  auto registers = [&](std::vector<double>& out) {
    out.resize(16 * 16);
    for (int lane = 0; lane < 32; ++lane) {
      op.registers[lane] = lanes[lane]->registers;
      std::memcpy(op.held[lane], lanes[lane]->registers, 16);
      for (int e = 0; e < 8; ++e) {
        const auto bits = static_cast<uint16_t>(op.held[lane][e / 2] >> 16 * (e % 2));
        const int row = lane / 4 + e / 2 % 2 * 8, k = lane % 4 * 2 + e % 2 + e / 4 * 8;
        out[k * 16 + row] = first.kind == 'b' ? bf16_to_float(bits) : fp16_to_float(bits);
      }
    }
  };
  std::vector<double> a, b;
  if (first.registers)
    registers(a);
  else
    operand(first.a, current_ / 32 % 4 * 16, 16, a);
  operand(first.b, 0, first.columns, b);

  for (int lane = 0; lane < 32; ++lane) {
    float* d = op.d[lane] = lanes[lane]->d;
    auto& [values, under_way] = warp.accumulators[d];
    if (under_way++ == 0) values.assign(d, d + first.columns / 2);
    for (int i = 0; i < first.columns / 2; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = values[i];
      for (int k = 0; k < 16; ++k) sum += a[k * 16 + row] * b[k * first.columns + column];
      values[i] = static_cast<float>(sum);
      d[i] = NAN;  // not to be used before the wait
    }
  }
  warp.open.push_back(std::move(op));
}

void Machine::wgmma_fence() {
  warp(WarpOp::wgmma_fence, nullptr,
       [](Machine& m, void* const*) { m.warps_[m.current_ / 32].fenced = true; });
}

void Machine::wgmma_commit() {
  warp(WarpOp::wgmma_commit, nullptr, [](Machine& m, void* const*) {
    Warp& warp = m.warps_[m.current_ / 32];
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
    warp.fenced = false;
  });
}

void Machine::finish_wgmma(Warp& warp, const Wgmma& op) {
  for (int lane = 0; lane < 32; ++lane)
    if (op.registers[lane] && std::memcmp(op.registers[lane], op.held[lane], 16))
      fail<RaceFault>("registers that a wgmma may still read were changed before its wait");
  for (uint32_t chunk : op.chunks)
    for (uint32_t c = chunk / kGranule; c < (chunk + 16) / kGranule; ++c) {
      Cell& cell = cells_[c];
      cell.in_flight--;
      note_read(c);  // the read ends only now
      cell.reader = kSeveral;
      cell.reader_warp = static_cast<uint16_t>(current_ / 32);
      cell.read_epoch = epoch_;
    }
  for (float* d : op.d) {
    auto found = warp.accumulators.find(d);
    if (--found->second.second) continue;
    std::copy(found->second.first.begin(), found->second.first.end(), d);
    warp.accumulators.erase(found);
  }
}

void Machine::wgmma_wait(size_t pending) {
  struct Argument {
    size_t pending;
  } argument{pending};
  warp(WarpOp::wgmma_wait, &argument, [](Machine& m, void* const* lanes) {
    Warp& warp = m.warps_[m.current_ / 32];
    while (warp.groups.size() > static_cast<Argument*>(lanes[0])->pending) {
      for (const Wgmma& op : warp.groups.front()) m.finish_wgmma(warp, op);
      warp.groups.pop_front();
    }
    int all[32];
    for (int i = 0; i < 32; ++i) all[i] = m.current_ / 32 * 32 + i;
    m.meet(all, 32);  // any lane may now tell others that the operands are free
  });
}

}  // namespace dbp::emulation
