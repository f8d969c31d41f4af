// An allocator for LD_PRELOAD under which a read or write beside a tensor faults: each block has
// pages of its own between closed ones, and ends at a closed page (or starts at one). Pages of
// freed blocks stay closed, fresh memory is filled with a byte of choice, and the n-th allocation
// can be made to fail. Only posix_memalign is guarded, which is where torch takes tensors from.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define EXPORT __attribute__((visibility("default")))
#define PAGE 4096ul
#define ARENA (1ul << 42)  // addresses, never reused; memory is only behind the open pages

// What precedes a block: a page with this, then a closed page.
typedef struct {
  char* data;
  size_t pages_size;
  char* block;
  size_t size;
  int fill;
} Header;

static char* arena;
static _Atomic size_t used;
static _Atomic long fail_in = -1;
static int enabled, at_start, fill = 0xCB;
static int (*next_memalign)(void**, size_t, size_t);
static void (*next_free)(void*);

__attribute__((constructor)) static void initialise(void) {
  next_memalign = dlsym(RTLD_NEXT, "posix_memalign");
  next_free = dlsym(RTLD_NEXT, "free");
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* memory = mmap(NULL, ARENA, PROT_NONE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    perror("guard: no address space");
    abort();
  }
  arena = memory;
}

EXPORT void guard_enable(int on) { enabled = on; }
EXPORT void guard_at_start(int on) { at_start = on; }
EXPORT void guard_fill(int byte) { fill = byte & 0xFF; }
EXPORT void guard_fail_in(long allocations) { fail_in = allocations; }

static int guarded(const void* pointer) {
  return arena && (const char*)pointer >= arena && (const char*)pointer < arena + ARENA;
}

EXPORT int posix_memalign(void** result, size_t alignment, size_t size) {
  if (!next_memalign) initialise();
  if (!enabled || size == 0) return next_memalign(result, alignment, size);
  if (fail_in >= 0 && fail_in-- == 0) return ENOMEM;
  const size_t open = (size + PAGE - 1) / PAGE * PAGE;
  const size_t offset = atomic_fetch_add(&used, open + 3 * PAGE);
  if (offset + open + 3 * PAGE > ARENA) return ENOMEM;
  char* page = arena + offset;
  char* data = page + 2 * PAGE;
  if (mprotect(page, PAGE, PROT_READ | PROT_WRITE) || mprotect(data, open, PROT_READ | PROT_WRITE))
    return ENOMEM;
  memset(data, fill, open);
  char* block = at_start ? data : data + open - size;
  *(Header*)page = (Header){data, open, block, size, fill};
  *result = block;
  return 0;
}

// Whether nobody wrote into what the block leaves of its pages.
static int untouched(const Header* h) {
  for (const char* at = h->data; at < h->data + h->pages_size; ++at) {
    if (at == h->block) at += h->size;
    if (at < h->data + h->pages_size && (unsigned char)*at != h->fill) return 0;
  }
  return 1;
}

EXPORT void free(void* pointer) {
  if (!guarded(pointer)) {
    if (!next_free) next_free = dlsym(RTLD_NEXT, "free");
    next_free(pointer);
    return;
  }
  char* data = (char*)((uintptr_t)pointer / PAGE * PAGE);
  Header* h = (Header*)(data - 2 * PAGE);
  if (h->block != pointer || !untouched(h)) {
    fprintf(stderr, "guard: %s\n",
            h->block != pointer ? "free of no block" : "write beside a block");
    abort();
  }
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  mmap(data - 2 * PAGE, h->pages_size + 2 * PAGE, PROT_NONE, flags, -1, 0);
}
