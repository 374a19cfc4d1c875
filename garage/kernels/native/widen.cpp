// Frozen matrices in few bits to bf16 or fp32, on a CPU: NF4 as `quant.Nf4` holds it, and int8 by row.
//
// Why so: a block of 64 numbers has one scale, so it has only 16 different results. They are multiplied and rounded once for each block, and
// the 64 numbers are then only looked up: two for every byte of codes, the high nibble first. With AVX-512 the 16 results lie in one register
// and a lookup of 32 bf16 numbers is one instruction; with SSSE3 it is two byte shuffles for 16; without either it is a load for each number.
//
// The results are those of `quant`'s torch path bit for bit: products and sums of fp32 are rounded one by one (-ffp-contract=off), and bf16 is
// rounded to the nearest, ties to even, by integers, because AVX-512's own conversion turns the smallest numbers into zeros. Which thread does
// a block changes nothing. Limits: `native.py` checks sizes, types and contiguity; nothing is checked here.

#include <cstdint>
#include <cstring>
#if defined(__AVX512BW__) || defined(__SSSE3__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 64, SCALES = 256, SMALL = 1 << 16;  // below SMALL numbers one thread is faster

void set(float& out, float value) { out = value; }

void set(uint16_t& out, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    out = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Rounding a NaN whose bits are all ones would overflow into a number.
float plain(float scale) { return scale == scale ? scale : __builtin_nanf(""); }

#if defined(__AVX512BW__)
// A byte's high nibble moves to the lower of two places and the byte itself to the upper; the lookup ignores higher bits, of which it sees
// at most one in a table of 32, and there the table repeats.
void look_up(const uint8_t* codes, const float* table, float* out) {
    const __m512 all = _mm512_loadu_ps(table);
    for (int i = 0; i < BLOCK; i += 16) {
        const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
        const __m512i at = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(at, all));
    }
}

void look_up(const uint8_t* codes, const uint16_t* table, uint16_t* out) {
    const __m512i all = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    for (int i = 0; i < BLOCK; i += 32) {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
        const __m512i at = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(at, all));
    }
}
#else
template <class T> void look_up(const uint8_t* codes, const T* table, T* out) {
    for (int i = 0; i < BLOCK; i += 2) out[i] = table[codes[i / 2] >> 4], out[i + 1] = table[codes[i / 2] & 15];
}
#if defined(__SSSE3__)
// Lower and upper bytes of the 16 results are two tables of bytes.
void look_up(const uint8_t* codes, const uint16_t* table, uint16_t* out) {
    uint8_t bytes[2][16];
    for (int i = 0; i < 16; i++) bytes[0][i] = table[i] & 255, bytes[1][i] = table[i] >> 8;
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[0])), nibble = _mm_set1_epi8(15);
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[1]));
    for (int i = 0; i < BLOCK; i += 16, out += 16) {
        const __m128i byte = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
        const __m128i at = _mm_and_si128(_mm_unpacklo_epi8(_mm_srli_epi16(byte, 4), byte), nibble);
        const __m128i lower = _mm_shuffle_epi8(low, at), upper = _mm_shuffle_epi8(high, at);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(lower, upper));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm_unpackhi_epi8(lower, upper));
    }
}
#endif
#endif

struct Once {
    const float* scales;
    float operator[](int64_t k) const { return scales[k]; }
};

struct Twice {
    const uint8_t* codes;
    const float *book, *largest, *offset;
    float operator[](int64_t k) const { return book[codes[k]] * largest[k / SCALES] + *offset; }
};

template <class T, class S> void nf4(const uint8_t* codes, const float* levels, S scales, T* out, int64_t numbers, int threads) {
    const int64_t blocks = (numbers + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (numbers >= SMALL)
    for (int64_t k = 0; k < blocks; k++) {
        const float scale = plain(scales[k]);
        const int64_t first = k * BLOCK, left = numbers - first;
        T table[16], last[BLOCK];
        for (int i = 0; i < 16; i++) set(table[i], levels[i] * scale);
        if (left >= BLOCK) {
            look_up(codes + first / 2, table, out + first);
            continue;
        }
        uint8_t padded[BLOCK / 2] = {};
        std::memcpy(padded, codes + first / 2, (left + 1) / 2);
        look_up(padded, table, last);
        std::memcpy(out + first, last, left * sizeof(T));
    }
}

template <class T> void int8(const int8_t* codes, const float* scales, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width >= SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const float scale = plain(scales[row]);
        for (int64_t i = row * width; i < (row + 1) * width; i++) set(out[i], codes[i] * scale);
    }
}

template <class S> void nf4(const uint8_t* codes, const float* levels, S scales, void* out, int64_t numbers, int is_bf16, int threads) {
    if (is_bf16) nf4(codes, levels, scales, static_cast<uint16_t*>(out), numbers, threads);
    else nf4(codes, levels, scales, static_cast<float*>(out), numbers, threads);
}

}  // namespace

extern "C" {
void nf4_once(const uint8_t* codes, const float* levels, const float* scales, void* out, int64_t rows, int64_t width, int is_bf16, int threads) {
    nf4(codes, levels, Once{scales}, out, rows * width, is_bf16, threads);
}

void nf4_twice(const uint8_t* codes, const float* levels, const uint8_t* scales, const float* book, const float* largest, const float* offset,
               void* out, int64_t rows, int64_t width, int is_bf16, int threads) {
    nf4(codes, levels, Twice{scales, book, largest, offset}, out, rows * width, is_bf16, threads);
}

void int8_rows(const int8_t* codes, const float* scales, void* out, int64_t rows, int64_t width, int is_bf16, int threads) {
    if (is_bf16) int8(codes, scales, static_cast<uint16_t*>(out), rows, width, threads);
    else int8(codes, scales, static_cast<float*>(out), rows, width, threads);
}
}
