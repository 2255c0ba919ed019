// Preloaded into the fuzzer's workers: every aligned allocation (torch's tensors, the kernels' scratch) ends at a
// page that cannot be touched, and no address serves twice. What is left of it to alignment holds a pattern that
// free() looks at. Beyond LIMIT bytes there is no memory, so that absurd sizes raise instead of filling the machine.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void* __libc_memalign(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void __libc_free(void*);

enum { PAGE = 4096, MARGIN = 64, PATTERN = 0xFA };
static const size_t RANGE = (size_t)1 << 36, LIMIT = (size_t)768 << 20;

static char* base;
static size_t* sizes;  // of the allocation that begins on a page
static size_t used, live;

static void* guarded(size_t align, size_t size) {
  if (!base) {
    char* range = mmap(0, RANGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    sizes = mmap(0, RANGE / PAGE * sizeof(size_t), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED || sizes == MAP_FAILED) abort();
    base = range;
  }
  if (align > PAGE) return __libc_memalign(align, size);
  const size_t padded = (size + align - 1) / align * align;
  if (padded < size || padded > LIMIT || live + padded > LIMIT) return 0;
  const size_t bytes = (padded + MARGIN + PAGE - 1) / PAGE * PAGE;
  const size_t at = __atomic_fetch_add(&used, bytes + PAGE, __ATOMIC_RELAXED);
  if (at + bytes + PAGE > RANGE || mprotect(base + at, bytes, PROT_READ | PROT_WRITE)) {
    return __libc_memalign(align, size);
  }
  __atomic_fetch_add(&live, bytes, __ATOMIC_RELAXED);
  sizes[at / PAGE] = size + 1;
  char* out = base + at + bytes - padded;
  memset(out - MARGIN, PATTERN, MARGIN);
  memset(out + size, PATTERN, padded - size);
  return out;
}

static int ours(const void* p) {
  return base && (const char*)p >= base && (const char*)p < base + RANGE;
}

static size_t first_page(const char* p) {
  size_t page = (size_t)(p - MARGIN - base) / PAGE;
  if (!sizes[page]) {
    static const char text[] = "guard_malloc: freed twice, or never allocated\n";
    if (write(2, text, sizeof text - 1)) abort();
  }
  return page;
}

static void release(char* p) {
  const size_t page = first_page(p), size = sizes[page] - 1;
  int whole = 1;
  for (int i = 1; i <= MARGIN; ++i) whole &= (unsigned char)p[-i] == PATTERN;
  char* end = base + page * PAGE + ((size_t)(p - base) - page * PAGE + size + PAGE - 1) / PAGE * PAGE;
  for (char* q = p + size; q < end; ++q) whole &= (unsigned char)*q == PATTERN;
  if (!whole) {
    static const char text[] = "guard_malloc: written outside of an allocation\n";
    if (write(2, text, sizeof text - 1)) abort();
  }
  const size_t bytes = (size_t)(end - base) - page * PAGE;
  sizes[page] = 0;
  madvise(base + page * PAGE, bytes, MADV_DONTNEED);
  mprotect(base + page * PAGE, bytes, PROT_NONE);
  __atomic_fetch_sub(&live, bytes, __ATOMIC_RELAXED);
}

int posix_memalign(void** out, size_t align, size_t size) {
  void* p = guarded(align, size);
  if (!p) return ENOMEM;
  *out = p;
  return 0;
}
void* aligned_alloc(size_t align, size_t size) {
  void* p = guarded(align, size);
  if (!p) errno = ENOMEM;
  return p;
}
void free(void* p) {
  if (ours(p)) {
    release(p);
  } else {
    __libc_free(p);
  }
}
void* realloc(void* p, size_t size) {
  if (!ours(p)) return __libc_realloc(p, size);
  void* out = malloc(size);
  const size_t old = sizes[first_page(p)] - 1;
  if (out) {
    memcpy(out, p, old < size ? old : size);
    release(p);
  }
  return out;
}
size_t malloc_usable_size(void* p) {
  if (ours(p)) return sizes[first_page(p)] - 1;
  static size_t (*next)(void*);
  if (!next) next = (size_t(*)(void*))dlsym(RTLD_NEXT, "malloc_usable_size");
  return next(p);
}
