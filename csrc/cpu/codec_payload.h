// Reading and writing of the payload of docs/format.md: header, code table, chunks. No torch here,
// so that the fuzzer can feed it bytes alone. Bytes are little-endian, as are the machines we build
// for.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/codec_kernel.h"

namespace cfl::codec {

using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*fn)(int64_t, int64_t, void*), void* context);
struct Threads {
  ParallelFor parallel_for = nullptr;  // null: one thread
  int64_t count = 1;
};

constexpr int64_t kHeaderBytes = 40;  // before the shape
constexpr int64_t kMaxSymbols = int64_t{1} << 40;
constexpr int kMinChunkLog2 = 10, kMaxChunkLog2 = 20;
constexpr int64_t kMaxDims = 64;
constexpr int64_t max_alphabet(int64_t symbol_size) { return symbol_size == 1 ? 256 : 65536; }
constexpr int64_t kCached = 1 << 20;  // outputs of more bytes are written past the caches

// What is wrong with a payload; ops/codec/codes.py has the words. A bad chunk is kBadChunk +
// its number.
enum Error : int64_t {
  kGood = 0,
  kTooShort = 1,
  kBadMagic = 2,
  kBadVersion = 3,
  kBadHeader = 4,
  kBadLength = 5,
  kBadHeaderChecksum = 6,
  kBadCodeTable = 7,
  kBadChunkSizes = 8,
  kOutOfRange = 9,  // the request, not the payload
  kBadChunk = 1000,
};

// The tree of a set of code lengths, with the memory it points into.
class CodeTree {
 public:
  // lengths[symbol], 0 where a symbol has no code; false unless the code is complete.
  bool build(const std::vector<uint8_t>& lengths);
  const Tree& tree() const { return tree_; }
  int longest() const { return longest_; }

 private:
  std::vector<Node> nodes_;
  std::vector<uint16_t> symbol_, rank_;
  std::vector<uint8_t> symbol8_;
  std::array<uint8_t, 256> rank8_;
  Tree tree_ = {};
  int longest_ = 0;
};

struct Header {
  int symbol_size = 1, chunk_log2 = 0;
  int64_t numel = 0, chunks = 0, ndim = 0;
  std::array<int64_t, kMaxDims> shape;
  const uint8_t* chunk_table = nullptr;  // (bytes, checksum) for each chunk, 4 bytes each
  const uint8_t* data = nullptr;         // the first chunk
  const uint8_t* end = nullptr;
  CodeTree code;
};

// Checks everything but the chunks themselves. Allocates no more than the code table. Only the
// first `available` bytes may be there: if the header is longer, minus its length comes back.
int64_t parse(const uint8_t* payload, int64_t size, int64_t available, Header* header,
              const Kernel* kernel);
inline int64_t parse(const uint8_t* payload, int64_t size, Header* header, const Kernel* kernel) {
  return parse(payload, size, size, header, kernel);
}

// Optimal code lengths for these counts (0: no code). Ties are broken by the order of the symbols,
// so that every implementation writes the same bytes.
std::vector<uint8_t> code_lengths(const std::vector<uint64_t>& counts);

// The code table of docs/format.md.
std::vector<uint8_t> pack_lengths(const std::vector<uint8_t>& lengths);
bool unpack_lengths(const uint8_t* bytes, int64_t size, int64_t alphabet,
                    std::vector<uint8_t>* lengths);

// Bytes 0..39 of a payload; its checksum covers bytes 40..head, which must be there already.
struct Fixed {
  int symbol_size, chunk_log2;
  int64_t numel, size, alphabet, ndim, table_bytes;
};
void write_fixed(uint8_t* payload, const Fixed& fixed, int64_t head, const Kernel* kernel);

// What is to be encoded: symbols in memory, or made on demand.
struct Symbols {
  int size = 1;  // bytes of a symbol
  int64_t n = 0;
  const uint8_t* data = nullptr;
  // Without data: writes symbols [begin, begin + count) to `out`, and is thread-safe; `encoded`
  // says whether a whole chunk is about to be encoded, or some are only counted. And the largest of
  // all symbols.
  std::function<void(int64_t begin, int64_t count, uint8_t* out, bool encoded)> make;
  int64_t largest = 0;
  // What making or encoding the chunk at `begin` will read, if that is known.
  std::function<Ahead(int64_t begin)> ahead;
};

// Every how many blocks of 4,096 symbols one is counted to find the code: 1 for all of them where
// a sample would cost more than about 0.001 bits a symbol. (Where one shows few symbols, all are
// counted after it.)
int64_t sample_stride(int64_t n, int64_t alphabet);

// The counts that the code is built from.
std::vector<uint64_t> sample_counts(const Symbols& symbols, const Kernel* kernel, Threads threads,
                                    bool* exact);

// `allocate(bytes)` gives the memory to write to, at most twice (the second time a larger one); the
// payload starts at its start. Returns the bytes used.
int64_t encode_payload(const Symbols& symbols, const int64_t* shape, int64_t ndim, int chunk_log2,
                       const Kernel* kernel, Threads threads,
                       const std::function<uint8_t*(int64_t)>& allocate);

// How decoded symbols become weights: group_size consecutive symbols share an Affine.
struct Weights {
  Float dtype = Float::kF32;
  int64_t group_size = 1;
  std::function<Affine(int64_t group, int* wide)> affine;
};

// Decodes symbols [start, start + count) to `out`, as symbols or (with `weights`) as weights.
int64_t decode_payload(const uint8_t* payload, int64_t size, int64_t start, int64_t count,
                       void* out, int out_symbol_size, const Weights* weights, const Kernel* kernel,
                       Threads threads);

const Kernel* best_kernel();
// For tests and benches: 0 generic, 1 AVX2, 2 AVX-512; the best one at or below it that there is.
const Kernel* kernel_at_most(int level);

}  // namespace cfl::codec
