//
// Why so: a step of a small batch is hundreds of calls on a few kilobytes each. Here an op is one call and one pass: numbers are widened to
// fp32 when they are read and rounded once when they are written. Vectors are 16 fp32 numbers in the compiler's own vector types, which it
// turns into what the processor has.
//
// Attention: one piece of work is some tokens of one request and one key/value head, with all query heads that share it. Keys come 16 at a
// time. Where the processor multiplies bf16, a register holds 32 channels of one key, and 16 sums are folded into one register of scores.
// Elsewhere keys are turned, so that a register holds one channel of 16 keys: a score is then a sum without a sum across a register.
// The softmax is kept as it grows (Milakov & Gimelshein, arXiv 1805.02867), in powers of 2. Only visible slots are read.
//
// Limits: `compiled.py` checks sizes, types and strides; nothing is checked here. Widths are multiples of 16, of 32 where heads are turned.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class To, class From> To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

Floats all(float x) { return Floats{} + x; }

Floats get(const float* at) {
    Floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

Floats get(const uint16_t* at) {
    Halves x;
    std::memcpy(&x, at, sizeof x);
    return as<Floats>(__builtin_convertvector(x, Bits) << 16);
}

float one(const float* at) { return *at; }

float one(const uint16_t* at) {
    const uint32_t bits = static_cast<uint32_t>(*at) << 16;
    return as<float>(bits);
}

void put(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

// Rounded to the nearest, halves to even; the processor's own instruction makes zeros of numbers below 1e-38.
Halves narrow(Floats x) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    const Bits bits = as<Bits>(x);
    const Halves half = __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Halves);
    const Halves nan = __builtin_convertvector((bits >> 16) | 0x40, Halves);
    return __builtin_convertvector(x == x, Halves) ? half : nan;
#endif
}

void put(uint16_t* at, Floats x) {
    const Halves half = narrow(x);
    std::memcpy(at, &half, sizeof half);
}

// As the number is once it was written.
float rounded(const float*, float x) { return x; }
Floats rounded(const float*, Floats x) { return x; }
Floats rounded(const uint16_t*, Floats x) { return as<Floats>(__builtin_convertvector(narrow(x), Bits) << 16); }

Floats larger(Floats a, Floats b) { return a > b ? a : b; }

#define EACH(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#if defined(__clang__)
#define PICK(a, b, f) __builtin_shufflevector(a, b, EACH(f))
#else
#define PICK(a, b, f) __builtin_shuffle(a, b, Ints{EACH(f)})
#endif

// Each number meets the one STEP places away.
template <int STEP> Floats other(Floats x) {
#define ACROSS(i) ((i) ^ STEP)
    return PICK(x, x, ACROSS);
}

float sum(Floats x) {
    x += other<8>(x), x += other<4>(x), x += other<2>(x), x += other<1>(x);
    return x[0];
}

float largest(Floats x) {
    x = larger(x, other<8>(x)), x = larger(x, other<4>(x)), x = larger(x, other<2>(x)), x = larger(x, other<1>(x));
    return x[0];
}

// 2^x: the whole part goes into the exponent; what is left, at most 1/2, into a polynomial (relative error 2e-7).
Floats power_of_2(Floats x) {
    x = larger(x, all(-126));
    const Floats moved = x + 12582912.0f, rest = x - (moved - 12582912.0f);
    Floats y = all(1.5403530e-4f);
    y = y * rest + 1.3333558e-3f;
    y = y * rest + 9.6181291e-3f;
    y = y * rest + 5.5504109e-2f;
    y = y * rest + 2.4022651e-1f;
    y = y * rest + 6.9314718e-1f;
    y = y * rest + 1.0f;
    return as<Floats>(as<Ints>(y) + (as<Ints>(moved) << 23));
}

constexpr float LOG2E = 1.44269504f;

template <class T> float inverse_rms(const T* x, int64_t width, float eps) {
    Floats squares{};
    for (int64_t i = 0; i < width; i += LANES) squares += get(x + i) * get(x + i);
    return 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
}

// One number of 16 of a norm; `rounds_first` as in `reference.rms_norm`.
template <class T> Floats normed(const T* x, const T* weight, int64_t i, float scale, float offset, bool rounds_first) {
    const Floats normal = get(x + i) * scale;
    if (!rounds_first) return rounded(x, normal * (get(weight + i) + offset));
    return rounded(x, rounded(x, normal) * (get(weight + i) + offset));
}

template <class T> void norm(const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps, float offset, int rounds_first, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width >= 1 << 16)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * width;
        const float scale = inverse_rms(from, width, eps);
        for (int64_t i = 0; i < width; i += LANES) put(y + row * width + i, normed(from, weight, i, scale, offset, rounds_first));
    }
}

struct Heads {
    int64_t tokens, heads, width, stride;
};

template <class T> void norm_turn(const T* x, const T* weight, const T* cos, const T* sin, T* y, Heads h, float eps, float offset, int rounds_first, int threads) {
    const int64_t half = h.width / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (h.tokens * h.heads * h.width >= 1 << 16)
    for (int64_t token = 0; token < h.tokens; token++) {
        for (int64_t head = 0; head < h.heads; head++) {
            const T* from = x + token * h.stride + head * h.width;
            T* to = y + (token * h.heads + head) * h.width;
            const float scale = inverse_rms(from, h.width, eps);
            for (int64_t i = 0; i < half; i += LANES) {
                const Floats a = normed(from, weight, i, scale, offset, rounds_first), b = normed(from, weight, i + half, scale, offset, rounds_first);
                const Floats c = get(cos + token * half + i), s = get(sin + token * half + i);
                put(to + i, a * c - b * s);
                put(to + i + half, b * c + a * s);
            }
        }
    }
}

// silu, or gelu in its tanh form, which is x times the logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3).
template <class T> void gate(const T* gates, const T* ups, T* y, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride, int is_gelu, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width >= 1 << 15)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t i = 0; i < width; i += LANES) {
            const Floats x = get(gates + row * gate_stride + i), up = get(ups + row * up_stride + i);
            const Floats slope = is_gelu ? (x + x * x * x * 0.044715f) * -1.59576912f : -x;
            put(y + row * width + i, x / (power_of_2(larger(slope * LOG2E, all(-126)) < all(126) ? slope * LOG2E : all(126)) + 1.0f) * up);
        }
    }
}

// The first place of the largest number of each row, NaN counts as largest: the block that has it is searched once more.
template <class T> void best(const T* x, int64_t* places, int64_t rows, int64_t width, int64_t stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width >= 1 << 16)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * stride;
        float top = -__builtin_inff();
        int64_t place = 0;
        for (int64_t i = 0; i < width && top == top;) {
            const int64_t block = i, end = std::min(width, block + 64 * LANES);
            Floats tops = all(top);
            Ints odd{};
            for (; i + LANES <= end; i += LANES) tops = larger(get(from + i), tops), odd |= get(from + i) != get(from + i);
            float here = largest(tops);
            for (; i < end; i++) here = one(from + i) <= here ? here : one(from + i);
            for (int lane = 0; lane < LANES; lane++) here = odd[lane] ? __builtin_nanf("") : here;
            if (!(here <= top)) top = here, place = block;
        }
        while (one(from + place) != top && one(from + place) == one(from + place)) place++;
        places[row] = place;
    }
}

template <class T> void write(const T* k, const T* v, T* keys, T* values, const int64_t* slots, int64_t tokens, int64_t width, int64_t k_stride, int64_t v_stride) {
    for (int64_t token = 0; token < tokens; token++) {
        std::memcpy(keys + slots[token] * width, k + token * k_stride, width * sizeof(T));
        std::memcpy(values + slots[token] * width, v + token * v_stride, width * sizeof(T));
    }
}

// Everything attention is told. The rows of request b are starts[b] to starts[b + 1], the last of its contexts[b] tokens.
struct Pages {
    const int64_t *tables, *starts, *contexts;
    int64_t table_stride, requests, heads, kv_heads, width, page, window, q_stride;
    float scale;
};

// Columns of a 16 x 16 block become its rows: single numbers of two rows change places, then pairs, fours and eights.
template <int STEP> void turn_by(Floats* x) {
#define LOW(i) ((i) & STEP ? LANES + (i) - STEP : (i))
#define HIGH(i) ((i) & STEP ? LANES + (i) : (i) + STEP)
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & STEP) continue;
        const Floats a = x[i], b = x[i + STEP];
        x[i] = PICK(a, b, LOW), x[i + STEP] = PICK(a, b, HIGH);
    }
}

// Memory of one piece of work, a thread's own and kept for the next piece; `o` begins as zeros.
struct Scratch {
    float *q, *o, *k, *v, *top, *total;
    Scratch(int64_t rows, int64_t width) {
        static thread_local std::vector<float> numbers;
        const size_t count = (2 * rows + 2 * LANES) * width + 2 * rows + LANES;
        if (numbers.size() < count) numbers.resize(count);
        auto at = reinterpret_cast<uintptr_t>(numbers.data());
        q = reinterpret_cast<float*>((at + 63) & ~uintptr_t(63));
        o = q + rows * width, k = o + rows * width, v = k + LANES * width, top = v + LANES * width, total = top + rows;
        std::fill(o, k, 0.0f);
    }
};

// c + a b, rounded once where the processor can: always, or never, so that a row's result does not depend on the rows beside it.
Floats plus(Floats c, Floats a, float b) {
#ifdef __AVX512F__
    return (Floats)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
#else
    return c + a * b;
#endif
}

// R rows against 16 turned keys.
template <int R> void scores(const float* q, const float* k, int64_t width, Floats* out) {
    Floats even[R] = {}, odd[R] = {};
    for (int64_t i = 0; i < width; i += 2) {
        const Floats a = get(k + i * LANES), b = get(k + (i + 1) * LANES);
        for (int r = 0; r < R; r++) even[r] = plus(even[r], a, q[r * width + i]), odd[r] = plus(odd[r], b, q[r * width + i + 1]);
    }
    for (int r = 0; r < R; r++) out[r] = even[r] + odd[r];
}

template <class T> constexpr bool HAS_DOTS = false;
template <int R> void dots(const float* q, const uint16_t* const* k, int64_t width, float scale, Floats* out);

#ifdef __AVX512BF16__
template <> constexpr bool HAS_DOTS<uint16_t> = true;

// Half of the registers go: lane by lane the sum of two lanes that differ in one bit, of the one register or of the other as that bit says.
template <int STEP> void fold(Floats* x) {
#pragma GCC unroll 8
    for (int i = 0; i < STEP; i++) {
        const Floats a = x[i], b = x[i + STEP];
        x[i] = PICK(a, b, LOW) + PICK(a, b, HIGH);
    }
}

// R rows against 16 keys as they lie; products of two bf16 numbers are exact, sums fp32.
template <int R> void dots(const float* q, const uint16_t* const* k, int64_t width, float scale, Floats* out) {
    for (int r = 0; r < R; r++) {
        const uint16_t* row = reinterpret_cast<const uint16_t*>(q + r * width);
        Floats sums[LANES] = {};
        for (int64_t i = 0; i < width; i += 2 * LANES) {
            const __mmask32 some = width - i < 2 * LANES ? 0xFFFF : 0xFFFFFFFF;
            const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(some, row + i);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) {
                sums[j] = (Floats)_mm512_dpbf16_ps((__m512)sums[j], (__m512bh)_mm512_maskz_loadu_epi16(some, k[j] + i), a);
            }
        }
        fold<8>(sums), fold<4>(sums), fold<2>(sums), fold<1>(sums);
        out[r] = sums[0] * scale;
    }
}
#endif

// o = o * keep + weights . v, 64 channels at a time.
template <int R> void mix(const Floats* weights, const float* v, const float* keep, float* o, int64_t width) {
    for (int64_t i = 0; i < width; i += 4 * LANES) {
        const int vectors = static_cast<int>(std::min<int64_t>(4, (width - i) / LANES));
        if (vectors < 4) {
            for (int r = 0; r < R; r++) {
                for (int c = 0; c < vectors; c++) {
                    Floats total = get(o + r * width + i + c * LANES) * keep[r];
                    for (int j = 0; j < LANES; j++) total = plus(total, get(v + j * width + i + c * LANES), weights[r][j]);
                    put(o + r * width + i + c * LANES, total);
                }
            }
            return;
        }
        Floats total[R][4];
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < 4; c++) total[r][c] = get(o + r * width + i + c * LANES) * keep[r];
        }
        for (int j = 0; j < LANES; j++) {
            for (int c = 0; c < 4; c++) {
                const Floats value = get(v + j * width + i + c * LANES);
                for (int r = 0; r < R; r++) total[r][c] = plus(total[r][c], value, reinterpret_cast<const float*>(weights + r)[j]);
            }
        }
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < 4; c++) put(o + r * width + i + c * LANES, total[r][c]);
        }
    }
}

// One tile of 16 keys for R rows; `place` holds their positions, `seen` the rows' own.
template <int R, class T> void add_tile(Scratch& s, int64_t row, const Pages& p, const T* const* k, Ints place, const int32_t* seen) {
    const int64_t width = p.width;
    const int32_t window = static_cast<int32_t>(p.window);
    Floats score[R];
    float keep[R];
    if constexpr (HAS_DOTS<T>) dots<R>(s.q + row * width, k, width, p.scale * LOG2E, score);
    else scores<R>(s.q + row * width, s.k, width, score);
    for (int r = 0; r < R; r++) {
        const int32_t last = seen[row + r];
        score[r] = (place <= last) & (place > last - window) ? score[r] : all(-__builtin_inff());
        const float top = std::max(s.top[row + r], largest(score[r]));
        const float base = top == -__builtin_inff() ? 0.0f : top;
        keep[r] = s.top[row + r] == -__builtin_inff() ? 0.0f : power_of_2(all(s.top[row + r] - base))[0];
        score[r] = score[r] > all(-1e30f) ? power_of_2(score[r] - base) : all(0.0f);
        s.total[row + r] = s.total[row + r] * keep[r] + sum(score[r]);
        s.top[row + r] = top;
    }
    mix<R>(score, s.v, keep, s.o + row * width, width);
}

constexpr int64_t ROWS = 48;  // query rows of one piece of work

// What one thread does in one go: some tokens of one request, of some key/value heads, and the positions that they see.
struct Piece {
    int64_t request, start, tokens, head, heads, low, high;
};

// Where 16 keys from `tile` on lie; behind the last, the last again, so that nothing is read that was not written.
void find(const Pages& p, const Piece& piece, int64_t tile, int64_t* slots) {
    int64_t page = tile / p.page, at = tile - page * p.page;
    for (int j = 0; j < LANES; j++) {
        slots[j] = p.tables[piece.request * p.table_stride + page] * p.page + at;
        if (tile + j + 1 >= piece.high) continue;
        if (++at == p.page) at = 0, page++;
    }
}

// 16 keys of one head are made ready for its rows, and those that come in 16 keys are fetched.
template <class T> void load_tile(Scratch& s, int64_t width, const T* const* k, const T* const* v, const T* const* k_next, const T* const* v_next) {
    for (int j = 0; j < LANES; j++) {
        for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(k_next[j] + i), __builtin_prefetch(v_next[j] + i);
        for (int64_t i = 0; i < width; i += LANES) put(s.v + j * width + i, get(v[j] + i));
    }
    for (int64_t i = 0; i < width && !HAS_DOTS<T>; i += LANES) {
        Floats block[LANES];
        for (int j = 0; j < LANES; j++) block[j] = get(k[j] + i);
        turn_by<1>(block), turn_by<2>(block), turn_by<4>(block), turn_by<8>(block);
        for (int j = 0; j < LANES; j++) put(s.k + (i + j) * LANES, block[j]);
    }
}

// `next` is what comes after this piece.
template <class T> void attend_piece(const T* q, const T* keys, const T* values, T* out, const Pages& p, const Piece& piece, const Piece& next) {
    const int64_t group = p.heads / p.kv_heads, width = p.width, each = piece.tokens * group, rows = each * piece.heads;
    const auto token = [&](int64_t r) { return piece.start + r % each / group; };
    const auto head = [&](int64_t r) { return (piece.head + r / each) * group + r % group; };
    Scratch s(rows, width);
    std::vector<int32_t> seen(rows);
    for (int64_t r = 0; r < rows; r++) {
        const T* from = q + token(r) * p.q_stride + head(r) * width;
        if constexpr (HAS_DOTS<T>) std::memcpy(s.q + r * width, from, width * sizeof(T));
        for (int64_t i = 0; i < width && !HAS_DOTS<T>; i += LANES) put(s.q + r * width + i, get(from + i) * (p.scale * LOG2E));
        s.top[r] = -__builtin_inff(), s.total[r] = 0;
        seen[r] = static_cast<int32_t>(piece.high - piece.tokens + r % each / group);
    }
    int64_t slots[2][LANES];
    find(p, piece, piece.low, slots[0]);
    for (int64_t tile = piece.low, turn = 0; tile < piece.high; tile += LANES, turn ^= 1) {
        const bool is_last = tile + LANES >= piece.high;
        const Piece& then = is_last ? next : piece;
        find(p, then, is_last ? next.low : tile + LANES, slots[turn ^ 1]);
        for (int64_t h = 0; h < piece.heads; h++) {
            Ints place;
            const T *k[2][LANES], *v[2][LANES];
            for (int j = 0; j < LANES; j++) {
                const int64_t at = (slots[turn][j] * p.kv_heads + piece.head + h) * width;
                const int64_t soon = (slots[turn ^ 1][j] * p.kv_heads + then.head + std::min(h, then.heads - 1)) * width;
                place[j] = static_cast<int32_t>(tile + j), k[0][j] = keys + at, v[0][j] = values + at, k[1][j] = keys + soon, v[1][j] = values + soon;
            }
            load_tile(s, width, k[0], v[0], k[1], v[1]);
            int64_t row = h * each;
            const int64_t last = row + each;
            for (; row + 4 <= last; row += 4) add_tile<4>(s, row, p, k[0], place, seen.data());
            if (last - row == 3) add_tile<3>(s, row, p, k[0], place, seen.data());
            if (last - row == 2) add_tile<2>(s, row, p, k[0], place, seen.data());
            if (last - row == 1) add_tile<1>(s, row, p, k[0], place, seen.data());
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        T* to = out + (token(r) * p.heads + head(r)) * width;
        for (int64_t i = 0; i < width; i += LANES) put(to + i, get(s.o + r * width + i) / s.total[r]);
    }
}

// Where there are requests enough, few tokens take all heads at once: their pages are then read from end to end.
template <class T> void attend(const T* q, const T* keys, const T* values, T* out, const Pages& p, int threads) {
    std::vector<Piece> pieces;
    const int64_t step = std::max<int64_t>(1, ROWS / (p.heads / p.kv_heads));
    for (int64_t b = 0; b < p.requests; b++) {
        const int64_t all = p.starts[b + 1] - p.starts[b], heads = all * p.heads <= ROWS && p.requests >= 4 * threads ? p.kv_heads : 1;
        for (int64_t first = 0; first < all; first += step) {
            const int64_t tokens = std::min(step, all - first), place = p.contexts[b] - all + first;
            const int64_t low = std::max<int64_t>(0, place + 1 - p.window);
            for (int64_t head = 0; head < p.kv_heads; head += heads) pieces.push_back({b, p.starts[b] + first, tokens, head, heads, low, place + tokens});
        }
    }
    const int64_t count = static_cast<int64_t>(pieces.size());
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (count >= 8)
    for (int64_t i = 0; i < count; i++) attend_piece(q, keys, values, out, p, pieces[i], pieces[std::min(i + 1, count - 1)]);
}

}  // namespace

#define BOTH(call) \
    if (is_bf16) call(uint16_t) \
    else call(float)

extern "C" {
void rms_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t width, float eps, float offset, int rounds_first, int is_bf16, int threads) {
#define CALL(T) norm((const T*)x, (const T*)weight, (T*)y, rows, width, eps, offset, rounds_first, threads);
    BOTH(CALL)
#undef CALL
}

void norm_rotate(const void* x, const void* weight, const void* cos, const void* sin, void* y, int64_t tokens, int64_t heads, int64_t width,
                 int64_t stride, float eps, float offset, int rounds_first, int is_bf16, int threads) {
    const Heads h{tokens, heads, width, stride};
#define CALL(T) norm_turn((const T*)x, (const T*)weight, (const T*)cos, (const T*)sin, (T*)y, h, eps, offset, rounds_first, threads);
    BOTH(CALL)
#undef CALL
}

void gated(const void* gates, const void* ups, void* y, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride, int is_gelu, int is_bf16,
           int threads) {
#define CALL(T) gate((const T*)gates, (const T*)ups, (T*)y, rows, width, gate_stride, up_stride, is_gelu, threads);
    BOTH(CALL)
#undef CALL
}

void best_of(const void* x, int64_t* places, int64_t rows, int64_t width, int64_t stride, int is_bf16, int threads) {
#define CALL(T) best((const T*)x, places, rows, width, stride, threads);
    BOTH(CALL)
#undef CALL
}

void paged_write(const void* k, const void* v, void* keys, void* values, const int64_t* slots, int64_t tokens, int64_t width, int64_t k_stride,
                 int64_t v_stride, int is_bf16) {
#define CALL(T) write((const T*)k, (const T*)v, (T*)keys, (T*)values, slots, tokens, width, k_stride, v_stride);
    BOTH(CALL)
#undef CALL
}

void paged_attend(const void* q, const void* keys, const void* values, void* out, const int64_t* tables, const int64_t* starts, const int64_t* contexts,
                  int64_t table_stride, int64_t requests, int64_t heads, int64_t kv_heads, int64_t width, int64_t page, int64_t window,
                  int64_t q_stride, float scale, int is_bf16, int threads) {
    const Pages p{tables, starts, contexts, table_stride, requests, heads, kv_heads, width, page, window, q_stride, scale};
#define CALL(T) attend((const T*)q, (const T*)keys, (const T*)values, (T*)out, p, threads);
    BOTH(CALL)
#undef CALL
}
}
