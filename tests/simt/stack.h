// Stacks for fibers, and the switch from one to another. Included once, by simt.cpp.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <stdexcept>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace simt {

struct Stack {
  char* memory = nullptr;
  size_t bytes = 0;
};

// The stack of fiber number `fiber`, for the life of the process, above a page that faults. Its
// pages appear as they are touched; its hot end lies elsewhere in the cache than its neighbours'.
inline Stack allocate_stack(size_t fiber) {
  constexpr size_t kBytes = 256 << 10, kColour = 448;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for the fibers' stacks");
  mprotect(memory, page, PROT_NONE);
  return {static_cast<char*>(memory) + page, kBytes - fiber * kColour % page};
}

// Switching stacks: save the callee-saved registers, swap the stack pointer, restore. It ends in a
// jump, as a return would upset the processor's prediction of returns.
#if defined(__x86_64__)
using Context = void*;
extern "C" void tokred_simt_switch(Context* from, Context to);
asm(R"(
.text
.hidden tokred_simt_switch
.globl tokred_simt_switch
tokred_simt_switch:
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
  popq %rcx
  jmp *%rcx
)");
inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack.memory + stack.bytes);
  top[-2] = reinterpret_cast<void*>(entry);  // leaves the stack as a call would: 8 mod 16
  context = top - 8;
}
inline void switch_context(Context& from, Context& to) { tokred_simt_switch(&from, to); }
#elif defined(__aarch64__)
using Context = void*;
extern "C" void tokred_simt_switch(Context* from, Context to);
asm(R"(
.text
.hidden tokred_simt_switch
.globl tokred_simt_switch
tokred_simt_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
)");
inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(stack.memory + stack.bytes) - 20;
  frame[0] = nullptr;
  frame[1] = reinterpret_cast<void*>(entry);
  context = frame;
}
inline void switch_context(Context& from, Context& to) { tokred_simt_switch(&from, to); }
#else
using Context = ucontext_t;
inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack.memory;
  context.uc_stack.ss_size = stack.bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

}  // namespace simt
