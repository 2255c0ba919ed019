// The inner loops of the weight codec, one table of functions per instruction set. Plain pointers,
// no torch and (for the sake of the per-ISA files) no C++ library. The layout is docs/format.md's.
#pragma once

#include <stdint.h>

namespace cfl::codec {

constexpr int kMaxLength = 60;     // of a code, in bits
constexpr int64_t kPad = 64;       // elements that loops may read or write past a scratch buffer
constexpr int64_t kReadPad = 128;  // bytes that a decoder may read past the last bit of a chunk

// A node of the code tree, in pre-order: the left child of inner node i is node i + 1. Symbols are
// numbered by rank: their order in the leaves from left to right.
struct Node {
  int32_t right;  // inner node: index of the right child; leaf: 0
  int32_t first;  // inner node: rank of the first symbol of the right child; leaf: of its first
  int32_t bits;   // leaf: it holds 2^bits symbols, told apart by that many raw bits
  int32_t base;   // leaf: the smallest symbol
  int32_t run;    // leaf: whether its symbols are base, base + 1, base + 2, ...
};

struct Tree {
  const Node* nodes;
  int32_t count;
  int32_t depth;           // inner nodes on the longest path
  int32_t symbols;         // with a code
  const uint16_t* symbol;  // by rank, padded by kPad
  const uint8_t* symbol8;  // the same for 8-bit symbols (unspecified where there are larger ones)
  const uint16_t* rank;    // by symbol, for 16-bit symbols that have a code
  const uint8_t* rank8;    // by symbol, 256 entries, for 8-bit symbols
};

// How symbol and weight go together: symbol = trunc((w * pre - origin) * scale), clamped to
// [0, top]; weight = (symbol + 0.5) * step + origin, times post. pre and post are powers of two, 1
// unless the range of the weights is near the limits of the float type.
struct Affine {
  double origin, scale, step, pre, post;
  int32_t top;
};

enum class Float : int32_t { kF16 = 0, kBF16 = 1, kF32 = 2, kF64 = 3 };
constexpr int kFloatSize[4] = {2, 2, 4, 8};

// Symbols, decoded before, that are still to be written as weights.
struct Pending {
  const uint8_t* symbols;
  int64_t n;
  uint8_t* out;
  Affine affine;
  Float dtype;
  int32_t wide;    // float64 arithmetic (always used for float64 weights)
  int32_t stream;  // the output is too large for the caches: write past them
};

// The elements of a lossless blob as lanes, and what is done to a lane's bits before its bytes
// become those of its planes: nothing; a rotation to the left, so that the exponent of a float
// fills bytes; or, of float64, its exponent moved, so that one byte holds that of usual weights.
enum class Cut : int32_t { kPlain = 0, kRotated = 1, kRebiased = 2 };
constexpr int kMaxPlanes = 8;
struct Lanes {
  int32_t width = 1;  // bytes: 1, 2, 4 or 8
  Cut cut = Cut::kPlain;
};

// Memory that will be read soon: its lines are asked for while others are worked on. No more than
// advice: addresses behind its end do no harm.
struct Ahead {
  const uint8_t* at;
  int64_t step;  // bytes from one demand to the next; 0: nothing is asked for
};

// Lanes whose planes are there, still to be put together.
struct Joining {
  const uint8_t* planes[kMaxPlanes];
  int64_t n;
  uint8_t* out;
  Lanes lanes;
  int32_t stream;  // the output is too large for the caches: write past them
  Ahead ahead;     // what is read next, while the lanes are written
};

struct Kernel {
  // Decodes n symbols from bits [0, bit_count) at `bits` (kReadPad readable bytes follow them).
  // Returns the number of bits read, or -1 where the tree asks for more. `arena` has room for
  // arena_size(tree, n) symbols. On the way it writes the weights of `pending` (may be null; of the
  // same symbol size), so that their stores drain while it computes.
  int64_t (*decode8)(const Tree*, const uint8_t* bits, int64_t bit_count, int64_t n, uint8_t* out,
                     uint8_t* arena, Pending* pending);
  int64_t (*decode16)(const Tree*, const uint8_t* bits, int64_t bit_count, int64_t n, uint16_t* out,
                      uint16_t* arena, Pending* pending);
  // Writes the code of n symbols and returns its length in bits; all symbols have a code. `arena`
  // is as for decoding; `out` has room for n * (longest code) bits and kReadPad bytes.
  int64_t (*encode8)(const Tree*, const uint8_t* symbols, int64_t n, uint8_t* out, uint8_t* arena,
                     Ahead ahead);
  int64_t (*encode16)(const Tree*, const uint16_t* symbols, int64_t n, uint8_t* out,
                      uint16_t* arena, Ahead ahead);
  // The CRC-32 of ISO-HDLC (zlib's), continued from `crc` (0 at the start).
  uint32_t (*crc32)(uint32_t crc, const uint8_t* data, int64_t n);
  // Adds the counts of the symbols to counts[0..255], or spread over two tables for 16-bit ones.
  void (*histogram8)(const uint8_t* symbols, int64_t n, uint64_t* counts);
  void (*histogram16)(const uint16_t* symbols, int64_t n, uint32_t* even, uint32_t* odd);
  uint16_t (*max16)(const uint16_t* symbols, int64_t n);
  // Smallest and largest value, exactly as stored; returns the number of NaN and Inf values, which
  // are passed over (with none left: +Inf and -Inf).
  int64_t (*range)(Float dtype, const void* w, int64_t n, double* minimum, double* maximum);
  // symbol_size 1 or 2; `wide` asks for float64 arithmetic (always used for float64 weights).
  void (*quantize)(Float dtype, const void* w, int64_t n, const Affine*, int wide, int symbol_size,
                   void* symbols);
  // Writes all that is pending, and makes streamed stores visible to other threads.
  void (*dequantize)(Pending*, int symbol_size);
  // Cuts n lanes into planes, that of the high bytes first; a null pointer is a plane not wanted.
  void (*split)(const Lanes*, const uint8_t* w, int64_t n, uint8_t* const* planes);
  // Copies bytes past the caches; join() or the end of a parallel region makes them visible.
  void (*copy_past)(uint8_t* to, const uint8_t* from, int64_t n);
  // Writes all lanes that are pending, and makes streamed stores visible to other threads.
  void (*join)(Joining*);
  // decode8, which on the way writes some of the lanes that are pending.
  int64_t (*decode8_joining)(const Tree*, const uint8_t* bits, int64_t bit_count, int64_t n,
                             uint8_t* out, uint8_t* arena, Joining* joining);
};

inline int64_t arena_size(const Tree& tree, int64_t n) { return (tree.depth + 2) * (n + 4 * kPad); }

// Null where the build or the CPU has not got the instructions.
const Kernel* kernel_generic();
const Kernel* kernel_avx2();
const Kernel* kernel_avx512();

}  // namespace cfl::codec
