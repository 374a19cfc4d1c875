// x W^T for a frozen W of 16, 8 or 4 bits, from one row of x to thousands, on x86 with AVX-512, BF16 and VNNI.
//
// Layout: 16 outputs lie side by side, and of each the numbers of one step: two of bf16, four of 8 bits. A load of 64 bytes then feeds 16
// lanes, sums never cross a register, and the matrix is read once, in order. A tile is 8 rows of x by 3 such blocks: 24 sums in registers.
// While the rows of a tile are worked on, what comes next is fetched, so that a few rows cost what reading the matrix costs.
//
// 8 bits: the rows of x are rounded to 8 bits with one scale each, and moved by 128 to be unsigned, as the instruction wants it;
// 128 times the sum of the weights is taken back at the end. 4 bits: a weight is (code - 8) times a whole number from 1 to 16 for each 32 inputs,
// so it is an 8-bit weight again, exactly: unpacked block by block for all rows, it takes the same way.
//
// The two instructions are written out, because compilers copy the sums otherwise. Limits: nothing is checked here, see `tiles.py`.

#if !defined(__AVX512BF16__) || !defined(__AVX512VNNI__) || !defined(__AVX512BW__)
#error "this processor has no AVX-512 with BF16 and VNNI"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16, ROWS = 8, BLOCKS = 3, FEW = 4, GROUP = 32, BYTES = 64, AHEAD = 2048;
constexpr int64_t SMALL = 1 << 18;  // products of fewer numbers are one thread's

struct Half {
    using X = uint16_t;
    using Sum = __m512;
    static constexpr int64_t STEP = 2;
    static Sum zero() { return _mm512_setzero_ps(); }
    static void add(Sum& sum, __m512i x, __m512i w) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }
};

struct Byte {
    using X = uint8_t;
    using Sum = __m512i;
    static constexpr int64_t STEP = 4;
    static Sum zero() { return _mm512_setzero_si512(); }
    static void add(Sum& sum, __m512i x, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }
};

__m512i spread(const void* at) {
    int32_t word;
    std::memcpy(&word, at, sizeof word);
    return _mm512_set1_epi32(word);
}

// Numbers of the output that exist, of 16.
__mmask16 some(int64_t count) { return count >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }

void put(float* at, __m512 x, int64_t count) { _mm512_mask_storeu_ps(at, some(count), x); }
void put(uint16_t* at, __m512 x, int64_t count) { _mm256_mask_storeu_epi16(at, some(count), (__m256i)_mm512_cvtneps_pbh(x)); }

__m512 get(const float* at, int64_t count) { return _mm512_maskz_loadu_ps(some(count), at); }
__m512 get(const uint16_t* at, int64_t count) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some(count), at)), 16));
}

// Where there are several tiles of rows, each fetches some lines of the next blocks: one in `every`, from `first` on.
struct Fetch {
    const char* at;
    int64_t first, every;
};

// `ALONE`: these are all rows, so that every line is fetched a moment before it is read, the next blocks' first lines included.
template <class T, bool ALONE, int R, int C, class Done>
void tile(const typename T::X* x, int64_t stride, const char* w, int64_t block, int64_t steps, Fetch next, Done done) {
    typename T::Sum sums[R * C];
#pragma GCC unroll 24
    for (int i = 0; i < R * C; i++) sums[i] = T::zero();
    int64_t wait = next.first;
    for (int64_t k = 0; k < steps; k++) {
        __m512i weights[C];
#pragma GCC unroll 3
        for (int c = 0; c < C; c++) weights[c] = _mm512_loadu_si512(w + c * block + k * BYTES);
        if constexpr (ALONE) {
            const char* soon = w + AHEAD + (k < steps - AHEAD / BYTES ? 0 : (C - 1) * block);
#pragma GCC unroll 3
            for (int c = 0; c < C; c++) _mm_prefetch(soon + c * block + k * BYTES, _MM_HINT_T0);
        } else if (wait-- == 0) {
            wait = next.every - 1;
#pragma GCC unroll 3
            for (int c = 0; c < C; c++) _mm_prefetch(next.at + c * block + k * BYTES, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const __m512i number = spread(x + r * stride + k * T::STEP);
#pragma GCC unroll 3
            for (int c = 0; c < C; c++) T::add(sums[r * C + c], number, weights[c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
        for (int c = 0; c < C; c++) done(sums[r * C + c], r, c);
    }
}

// The next tile of at most 8 rows; returns how many it has.
template <class T, bool ALONE, int C, class Done>
int64_t some_rows(const typename T::X* x, int64_t stride, int64_t left, const char* w, int64_t block, int64_t steps, Fetch next, Done done) {
    if (left >= 8) return tile<T, ALONE, 8, C>(x, stride, w, block, steps, next, done), 8;
    if (left >= 4) return tile<T, ALONE, 4, C>(x, stride, w, block, steps, next, done), 4;
    if (left >= 2) return tile<T, ALONE, 2, C>(x, stride, w, block, steps, next, done), 2;
    return tile<T, ALONE, 1, C>(x, stride, w, block, steps, next, done), 1;
}

template <class T, int C, class Done>
void all_rows(const typename T::X* x, int64_t stride, int64_t rows, const char* w, int64_t block, int64_t steps, const char* next, Done done) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    for (int64_t row = 0, i = 0; row < rows; i++) {
        const auto there = [&](auto sum, int r, int c) { done(sum, row + r, c); };
        const Fetch fetch{next, std::min(i, steps), tiles};
        if (tiles == 1) row += some_rows<T, true, C>(x + row * stride, stride, rows - row, w, block, steps, fetch, there);
        else row += some_rows<T, false, C>(x + row * stride, stride, rows - row, w, block, steps, fetch, there);
    }
}

struct Shape {
    int64_t rows, outputs, stride, steps;  // stride: numbers from one row of x to the next; steps: of the padded width
};

// Blocks `first` to `last` for all rows. `unpack` gives the 8- or 16-bit blocks from `n` on, `done` takes the sums.
template <class T, class Unpack, class Done>
void blocks(const typename T::X* x, Shape s, int64_t first, int64_t last, Unpack unpack, Done done) {
    const int64_t block = s.steps * BYTES;
    for (int64_t n = first; n < last; n += BLOCKS) {
        const int count = static_cast<int>(std::min(BLOCKS, last - n));
        const char* w = unpack(n, count);
        const auto there = [&](auto sum, int64_t row, int c) { done(sum, row, (n + c) * LANES); };
        const char* next = w + count * block;
        if (count == 3) all_rows<T, 3>(x, s.stride, s.rows, w, block, s.steps, next, there);
        else if (count == 2) all_rows<T, 2>(x, s.stride, s.rows, w, block, s.steps, next, there);
        else all_rows<T, 1>(x, s.stride, s.rows, w, block, s.steps, next, there);
    }
}

// What `threads` threads do in turns of whole tiles; `work` gets its blocks.
template <class Work> void shared(Shape s, int threads, Work work) {
    const int64_t all = (s.outputs + LANES - 1) / LANES, tiles = (all + BLOCKS - 1) / BLOCKS;
    const int64_t parts = s.outputs * s.steps * LANES < SMALL ? 1 : std::min<int64_t>(threads, tiles);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(parts)) if (parts > 1)
    for (int64_t i = 0; i < parts; i++) work(tiles * i / parts * BLOCKS, std::min(all, tiles * (i + 1) / parts * BLOCKS));
}

// One row of x in 8 bits, moved by 128; what fills up the width is 0, which the weights make nothing of.
template <class T> float to_bytes(const T* x, int64_t width, int64_t padded, uint8_t* out) {
    __m512 top = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) top = _mm512_max_ps(top, _mm512_abs_ps(get(x + i, width - i)));
    const float largest = _mm512_reduce_max_ps(top), scale = largest > 0 ? largest / 127 : 1;
    const __m512 inverse = _mm512_set1_ps(1 / scale);
    for (int64_t i = 0; i < padded; i += LANES) {
        const __m512 number = i < width ? get(x + i, width - i) : _mm512_setzero_ps();
        const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(number, inverse)), _mm512_set1_epi32(128));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(whole));
    }
    return largest == largest ? scale : largest;
}

// 8-bit blocks from 4-bit ones: a byte holds the codes of two steps, and one multiplication of 16 bits is two of codes, at most 15 * 16.
void widen(const uint8_t* codes, const uint8_t* factors, int64_t steps, char* out) {
    constexpr int64_t PER_GROUP = GROUP / Byte::STEP;
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t k = 0; k < steps; k += PER_GROUP, factors += LANES) {
        const __m512i factor = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(factors)));
        const __m512i twice = _mm512_mullo_epi32(factor, _mm512_set1_epi32(0x10001)), middle = _mm512_mullo_epi32(factor, _mm512_set1_epi32(0x8080808));
        for (int64_t i = 0; i < PER_GROUP; i += 2, codes += BYTES, out += 2 * BYTES) {
            const __m512i both = _mm512_loadu_si512(codes);
            _mm_prefetch(reinterpret_cast<const char*>(codes) + AHEAD, _MM_HINT_T0);
            const __m512i one = _mm512_and_si512(both, low), other = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            _mm512_storeu_si512(out, _mm512_sub_epi8(_mm512_mullo_epi16(one, twice), middle));
            _mm512_storeu_si512(out + BYTES, _mm512_sub_epi8(_mm512_mullo_epi16(other, twice), middle));
        }
    }
}

// Up to four rows take the codes as they come: over a group the sum of x code, less 8 times that of x, times the factor, is the same whole
// number, and nothing is written on the way. `eights` is 8 times the sum of x in each group.
template <int R> void few(const uint8_t* x, int64_t stride, const int32_t* eights, const uint8_t* codes, const uint8_t* factors, int64_t steps, __m512i* total) {
    constexpr int64_t PER_GROUP = GROUP / Byte::STEP;
    const int64_t groups = steps / PER_GROUP;
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) total[r] = Byte::zero();
    for (int64_t g = 0; g < groups; g++, x += GROUP) {
        const __m512i factor = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(factors + g * LANES)));
        __m512i sums[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r] = _mm512_set1_epi32(-eights[r * groups + g]);
#pragma GCC unroll 4
        for (int64_t i = 0; i < PER_GROUP; i += 2, codes += BYTES) {
            const __m512i both = _mm512_loadu_si512(codes);
            _mm_prefetch(reinterpret_cast<const char*>(codes) + AHEAD, _MM_HINT_T0);
            const __m512i one = _mm512_and_si512(both, low), other = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                Byte::add(sums[r], spread(x + r * stride + i * Byte::STEP), one);
                Byte::add(sums[r], spread(x + r * stride + (i + 1) * Byte::STEP), other);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) total[r] = _mm512_add_epi32(total[r], _mm512_mullo_epi32(factor, sums[r]));
    }
}

struct Narrow {
    const char* codes;
    const uint8_t* factors;  // null: 8 bits
    const float* scales;
    const int32_t* sums;
};

template <class T> void narrow(const T* x, Narrow w, T* y, int64_t rows, int64_t outputs, int64_t width, int threads) {
    const int64_t padded = (width + GROUP - 1) / GROUP * GROUP, steps = padded / Byte::STEP;
    std::vector<uint8_t> bytes(rows * padded);
    std::vector<float> scales(rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows >= 16)
    for (int64_t row = 0; row < rows; row++) scales[row] = to_bytes(x + row * width, width, padded, bytes.data() + row * padded);
    const Shape shape{rows, outputs, padded, steps};
    const auto finish = [&](__m512i sum, int64_t row, int64_t n) {
        const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_loadu_si512(w.sums + n)));
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(w.scales + n), _mm512_set1_ps(scales[row]));
        put(y + row * outputs + n, _mm512_mul_ps(exact, scale), outputs - n);
    };
    if (w.factors && rows <= FEW) {
        std::vector<int32_t> eights(rows * padded / GROUP);
        for (int64_t i = 0; i < rows * padded; i++) eights[i / GROUP] += 8 * bytes[i];
        shared(shape, threads, [&](int64_t first, int64_t last) {
            constexpr decltype(&few<1>) by_rows[] = {few<1>, few<2>, few<3>, few<4>};
            for (int64_t n = first; n < last; n++) {
                __m512i total[FEW];
                const auto* codes = reinterpret_cast<const uint8_t*>(w.codes) + n * steps * BYTES / 2;
                by_rows[rows - 1](bytes.data(), padded, eights.data(), codes, w.factors + n * padded / GROUP * LANES, steps, total);
                for (int64_t row = 0; row < rows; row++) finish(total[row], row, n * LANES);
            }
        });
        return;
    }
    shared(shape, threads, [&](int64_t first, int64_t last) {
        std::vector<char> wide(w.factors ? BLOCKS * steps * BYTES : 0);
        const auto unpack = [&](int64_t n, int count) -> const char* {
            if (!w.factors) return w.codes + n * steps * BYTES;
            for (int c = 0; c < count; c++) {
                const auto* codes = reinterpret_cast<const uint8_t*>(w.codes) + (n + c) * steps * BYTES / 2;
                widen(codes, w.factors + (n + c) * padded / GROUP * LANES, steps, wide.data() + c * steps * BYTES);
            }
            return wide.data();
        };
        blocks<Byte>(bytes.data(), shape, first, last, unpack, finish);
    });
}

}  // namespace

extern "C" {
void product_bf16(const uint16_t* x, const char* w, uint16_t* y, int64_t rows, int64_t outputs, int64_t width, int threads) {
    const Shape shape{rows, outputs, width, width / Half::STEP};
    shared(shape, threads, [&](int64_t first, int64_t last) {
        const auto there = [&](int64_t n, int) { return w + n * shape.steps * BYTES; };
        blocks<Half>(x, shape, first, last, there, [&](__m512 sum, int64_t row, int64_t n) { put(y + row * outputs + n, sum, outputs - n); });
    });
}

void product_narrow(const void* x, const char* codes, const uint8_t* factors, const float* scales, const int32_t* sums, void* y, int64_t rows,
                    int64_t outputs, int64_t width, int is_bf16, int threads) {
    const Narrow w{codes, factors, scales, sums};
    if (is_bf16) narrow(static_cast<const uint16_t*>(x), w, static_cast<uint16_t*>(y), rows, outputs, width, threads);
    else narrow(static_cast<const float*>(x), w, static_cast<float*>(y), rows, outputs, width, threads);
}
}
