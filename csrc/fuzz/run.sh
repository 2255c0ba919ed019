#!/usr/bin/env bash
# Builds a fuzzer of the codec under AddressSanitizer and UBSan and runs it: csrc/fuzz/run.sh [runs] [codec | delta]
# clang gives the coverage-guided libFuzzer; without clang, g++ builds a driver of random mutations.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs="${1:-1000000}"
target="${2:-codec}"
build="${FUZZ_BUILD:-build/fuzz}"
corpus="$build/corpus"
[ "$target" = codec ] || corpus="$build/corpus_$target"
mkdir -p "$corpus"
clang=""
for name in clang++ clang++-2{2,1,0} clang++-1{9,8,7,6,5,4}; do
  if command -v "$name" >/dev/null; then clang="$name"; break; fi
done
flags="-std=c++20 -g -O1 -fno-omit-frame-pointer -ffp-contract=off -Icsrc"
if [ -n "$clang" ]; then
  compiler="$clang"
  sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
  flags="$flags -fsanitize=fuzzer-no-link"
  link="-fsanitize=fuzzer"
else
  compiler="${CXX:-g++}"
  sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
  flags="$flags -DCFL_FUZZ_STANDALONE"
  link=""
fi
avx2="" avx512=""
if [ "$(uname -m)" = x86_64 ]; then
  flags="$flags -DCFL_HAVE_X86_ISAS"
  avx2="-mavx2 -mfma -mf16c -mbmi2 -mpopcnt -mpclmul"
  avx512="$avx2 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx512vbmi -mavx512vbmi2 -mvpclmulqdq"
fi
objects=()
compile() {  # source, extra flags
  object="$build/$(basename "$1" .cpp).o"
  objects+=("$object")
  # shellcheck disable=SC2086
  if [ ! "$object" -nt "$1" ] || [ -n "$(find csrc/cpu -name 'codec_*.h' -newer "$object")" ]; then
    $compiler $flags $sanitize $2 -c "$1" -o "$object"
  fi
}
compile "csrc/fuzz/${target}_fuzz.cpp" ""
compile csrc/cpu/codec_code.cpp ""
compile csrc/cpu/codec_payload.cpp ""
compile csrc/cpu/codec_lossless.cpp ""
compile csrc/cpu/codec_tables.cpp ""
compile csrc/cpu/codec_kernel_generic.cpp ""
compile csrc/cpu/codec_kernel_avx2.cpp "$avx2"
compile csrc/cpu/codec_kernel_avx512.cpp "$avx512"
if [ "$target" = delta ]; then
  compile csrc/cpu/codec_delta.cpp ""
  compile csrc/cpu/codec_delta_generic.cpp ""
  compile csrc/cpu/codec_delta_avx2.cpp "$avx2"
  compile csrc/cpu/codec_delta_avx512.cpp "$avx512"
fi
# shellcheck disable=SC2086
$compiler $sanitize $link "${objects[@]}" -o "$build/${target}_fuzz"
if [ -z "$clang" ]; then
  exec "$build/${target}_fuzz" "$runs"
fi
if [ "$target" = delta ]; then  # it finds its own way: nothing is behind a checksum
  exec "$build/delta_fuzz" -runs="$runs" -max_len=3000 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 "$corpus"
fi
# Seeds: the golden payloads and lossless blobs, plain and with repaired checksums.
for golden in tests/data/huffman_*.bin; do
  for mode in '\002' '\006' '\016' '\022' '\005' '\004' '\056'; do
    { printf "$mode"; cat "$golden"; } >"$build/corpus/seed_$(basename "$golden" .bin)_${mode#?}"
  done
done
for golden in tests/data/lossless_*.bin; do
  for mode in '\102' '\106' '\116' '\122' '\105' '\104'; do
    { printf "$mode"; cat "$golden"; } >"$build/corpus/seed_$(basename "$golden" .bin)_${mode#?}"
  done
done
exec "$build/codec_fuzz" -runs="$runs" -max_len=6000 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 "$build/corpus"
