// Runs the kernels on a CPU, for tests where there is no GPU: the sources are compiled by a C++ compiler with
// HEADWATER_EMULATED, and src/kernels/cuda/emulator.rs calls emulate_NAME for the kernel called NAME.
//
// Each thread of a block is a fiber of its own; it runs until it waits for others. A warp runs as far as it can
// before the next one does, in ascending or in descending order: where a barrier is missing, one is far ahead of the
// others and results are wrong. Copies that run beside the threads happen as late as they may in ascending order,
// and at once in descending order.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

using std::max;
using std::min;

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t STACK = 256 << 10;

#ifdef __x86_64__
/// Where a fiber stands: the top of its stack, on which its registers are.
using Place = void *;

extern "C" void emulation_go(Place *from, Place to);
asm(R"(
.text
.type emulation_go, @function
emulation_go:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void go(Place &from, Place &to) { emulation_go(&from, to); }

/// A fiber that is about to begin. `begin` does not return.
inline void prepare(Place &place, std::vector<char> &stack, void (*begin)()) {
  const uintptr_t end = (uintptr_t)(stack.data() + stack.size()) / 16 * 16;
  void **top = reinterpret_cast<void **>(end) - 2; // a function begins 8 bytes off a multiple of 16
  *top = reinterpret_cast<void *>(begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  place = top;
}
#else
using Place = ucontext_t;
inline void go(Place &from, Place &to) { swapcontext(&from, &to); }
inline void prepare(Place &place, std::vector<char> &stack, void (*begin)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = stack.data();
  place.uc_stack.ss_size = stack.size();
  place.uc_link = nullptr;
  makecontext(&place, begin, 0);
}
#endif

struct Copy {
  void *to;
  const void *from;
  bool is_there;

  void run() const {
    if (is_there) memcpy(to, from, 16);
    else memset(to, 0, 16);
  }
};

/// A place where `size` fibers wait for each other.
struct Barrier {
  unsigned size = 0, arrived = 0, round = 0;
};

struct Fiber {
  Place place;
  const Barrier *waits_at = nullptr;
  unsigned round = 0; // of the barrier when it came there
  std::vector<char> stack = std::vector<char>(STACK);
  bool is_done = true;
  std::deque<std::vector<Copy>> groups; // closed
  std::vector<Copy> open;
};

struct Warp {
  Barrier barrier;
  uint32_t words[32][6];
  const void *pointers[32];
};

struct State {
  std::vector<Fiber *> fibers;
  std::vector<Warp> warps;
  Barrier block;
  Place home;
  unsigned current = 0;
  bool is_descending = false;
  void (*body)(void *) = nullptr;
  void *argument = nullptr;
};
static State state;

inline void wait_at(Barrier &barrier) {
  Fiber &fiber = *state.fibers[state.current];
  fiber.waits_at = &barrier;
  fiber.round = barrier.round;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  go(fiber.place, state.home);
}

inline bool can_run(const Fiber &fiber) {
  return !fiber.is_done && !(fiber.waits_at && fiber.waits_at->round == fiber.round);
}

/// Runs the threads of a warp until each is done or waits for another warp.
inline bool run_warp(unsigned first, unsigned end) {
  bool has_run = false;
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (unsigned i = first; i < end; ++i) {
      state.current = state.is_descending ? first + end - 1 - i : i;
      Fiber &fiber = *state.fibers[state.current];
      if (!can_run(fiber)) continue;
      threadIdx = {state.current, 0, 0};
      go(state.home, fiber.place);
      has_run = goes_on = true;
    }
  }
  return has_run;
}

inline unsigned lane() { return state.current % 32; }
inline Warp &warp() { return state.warps[state.current / 32]; }
inline void wait_for_warp() { wait_at(warp().barrier); }

inline void start() {
  state.body(state.argument);
  Fiber &fiber = *state.fibers[state.current];
  // A copy that was never waited for never happened.
  fiber.is_done = true;
  Warp &own = warp();
  --own.barrier.size; // who has returned is not waited for
  --state.block.size;
  if (own.barrier.arrived != 0 && own.barrier.arrived == own.barrier.size) std::abort(); // a lane left its warp alone
  if (state.block.arrived != 0 && state.block.arrived == state.block.size) std::abort(); // or its block
  go(fiber.place, state.home);
}

/// Runs one block of threads.
inline void run_block(unsigned threads, bool is_descending, void (*body)(void *), void *argument) {
  state.is_descending = is_descending;
  state.body = body;
  state.argument = argument;
  state.warps.assign((threads + 31) / 32, Warp());
  for (unsigned i = 0; i < threads; ++i) ++state.warps[i / 32].barrier.size;
  state.block = {threads, 0, 0};
  while (state.fibers.size() < threads) state.fibers.push_back(new Fiber());
  for (unsigned i = 0; i < threads; ++i) {
    Fiber &fiber = *state.fibers[i];
    fiber.is_done = false;
    fiber.waits_at = nullptr;
    fiber.groups.clear();
    fiber.open.clear();
    prepare(fiber.place, fiber.stack, start);
  }
  const unsigned warps = state.warps.size();
  for (bool has_run = true; has_run;) {
    has_run = false;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned first = 32 * (is_descending ? warps - 1 - i : i);
      has_run |= run_warp(first, min(first + 32, threads));
    }
  }
  for (unsigned i = 0; i < threads; ++i)
    if (!state.fibers[i]->is_done) std::abort(); // some wait for others that have gone
}

/// Calls a kernel with arguments that stand behind pointers.
template <typename... A, size_t... I>
void call_with(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
  kernel(*reinterpret_cast<A *>(arguments[I])...);
}

template <typename... A> void run(void (*kernel)(A...), const unsigned *shape, void **arguments) {
  struct Call {
    void (*kernel)(A...);
    void **arguments;
  } call = {kernel, arguments};
  auto body = [](void *argument) {
    Call &call = *static_cast<Call *>(argument);
    call_with(call.kernel, call.arguments, std::index_sequence_for<A...>());
  };
  gridDim = {shape[0], shape[1], shape[2]};
  blockDim = {shape[3], 1, 1};
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        run_block(blockDim.x, shape[4] != 0, body, &call);
      }
}

/// Each lane shows a word, and sees that of lane `from`.
inline uint32_t exchange(uint32_t word, unsigned from) {
  warp().words[lane()][0] = word;
  wait_for_warp();
  const uint32_t seen = warp().words[from % 32][0];
  wait_for_warp();
  return seen;
}

} // namespace emulation

#define EXPORT(name)                                                                                                   \
  extern "C" void emulate_##name(const unsigned *shape, void **arguments) { emulation::run(name, shape, arguments); }

alignas(128) static unsigned char emulated_shared[227 << 10];
#define DYNAMIC_SHARED(name) unsigned char *name = emulated_shared
/// For what a kernel must not rely on finding in shared memory.
extern "C" void spoil_shared(unsigned char with) { memset(emulated_shared, with, sizeof emulated_shared); }

inline void __syncthreads() { emulation::wait_at(emulation::state.block); }
inline void __syncwarp() { emulation::wait_for_warp(); }

template <typename T> T __shfl_sync(unsigned, T value, unsigned from) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  memcpy(&word, &value, 4);
  word = emulation::exchange(word, from);
  memcpy(&value, &word, 4);
  return value;
}
template <typename T> T __shfl_xor_sync(unsigned all, T value, unsigned step) {
  return __shfl_sync(all, value, emulation::lane() ^ step);
}

struct __nv_bfloat16 {
  uint16_t bits;
};
using __half = _Float16;

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return (float)x; }
inline __half __float2half_rn(float x) { return (__half)x; }

// Twins of tensor_core.cuh.

inline float exp2_fast(float x) { return std::exp2(x); }

inline uint32_t pair(float x, float y) {
  return __float2bfloat16_rn(x).bits | (uint32_t)__float2bfloat16_rn(y).bits << 16;
}

/// Element `index` of a matrix of rows of two elements a word.
inline float element(uint32_t word, unsigned index) {
  return __bfloat162float({(uint16_t)(index % 2 ? word >> 16 : word)});
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Warp &warp = emulation::warp();
  const unsigned lane = emulation::lane(), g = lane / 4, t = lane % 4;
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  memcpy(warp.words[lane], own, sizeof own);
  emulation::wait_for_warp();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      // Where row `row`, depth `k` of a, and depth `k`, column `column` of b are held.
      const uint32_t left = warp.words[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const uint32_t right = warp.words[column * 4 + k % 8 / 2][4 + k / 8];
      c[i] += element(left, k) * element(right, k);
    }
  }
  emulation::wait_for_warp();
}

inline void load_any(uint32_t (&to)[4], const void *row, bool is_transposed) {
  emulation::Warp &warp = emulation::warp();
  const unsigned lane = emulation::lane(), g = lane / 4, t = lane % 4;
  if ((uintptr_t)row % 16 != 0) std::abort();
  warp.pointers[lane] = row;
  emulation::wait_for_warp();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint32_t word = 0;
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned of_row = is_transposed ? 2 * t + i : g, column = is_transposed ? g : 2 * t + i;
      const uint16_t *from = static_cast<const uint16_t *>(warp.pointers[8 * matrix + of_row]);
      word |= (uint32_t)from[column] << 16 * i;
    }
    to[matrix] = word;
  }
  emulation::wait_for_warp();
}
inline void load_matrices(uint32_t (&to)[4], const void *row) { load_any(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void *row) { load_any(to, row, true); }

inline void copy_async(void *to, const void *from, bool is_there) {
  if ((uintptr_t)to % 16 != 0 || (uintptr_t)from % 16 != 0) std::abort();
  const emulation::Copy copy = {to, from, is_there};
  if (emulation::state.is_descending) copy.run();
  else emulation::state.fibers[emulation::state.current]->open.push_back(copy);
}
inline void close_copies() {
  emulation::Fiber &fiber = *emulation::state.fibers[emulation::state.current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int N> void await_copies() {
  emulation::Fiber &fiber = *emulation::state.fibers[emulation::state.current];
  while (fiber.groups.size() > N) {
    for (const emulation::Copy &copy : fiber.groups.front()) copy.run();
    fiber.groups.pop_front();
  }
}
