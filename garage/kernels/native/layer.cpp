// A decoder layer of answering in one call: norms, products, rotation, pages, attention and gate of `serve.cpp` and `product.cpp`, in bf16.
//
// Why so: a step of one token is some four hundred ops of a few microseconds, and calling each from Python costs as much as the op. The layer
// calls the same compiled ops in the same order, so its numbers are theirs bit for bit. They are given as pointers: each library is
// compiled by itself.
//
// Limits: bf16; `compiled.py` checks the rest. x is changed in place. What lies between two ops is kept for the next layer, per thread.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using T = uint16_t;

float wide(T half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

T narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<T>(x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40);
}

void add(T* x, const T* y, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= 1 << 17)
    for (int64_t i = 0; i < count; i++) x[i] = narrow(wide(x[i]) + wide(y[i]));
}

}  // namespace

extern "C" {
struct Calls {
    void (*rms_norm)(const void*, const void*, void*, int64_t, int64_t, float, float, int, int, int);
    void (*norm_rotate)(const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, float, float, int, int, int);
    void (*gated)(const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int, int, int);
    void (*paged_write)(const void*, const void*, void*, void*, const int64_t*, int64_t, int64_t, int64_t, int64_t, int);
    void (*paged_attend)(const void*, const void*, const void*, void*, const int64_t*, const int64_t*, const int64_t*, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t, float, int, int);
    void (*product_bf16)(const void*, const void*, void*, int64_t, int64_t, int64_t, int);
    void (*product_narrow)(const void*, const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int, int);
};

// Tiles as `tiles.Tiles`; without scales they are bf16.
struct Matrix {
    const void *codes, *factors, *scales, *sums;
    int64_t outputs, width;
};

struct Layer {
    Matrix qkv, out, gate_up, down;
    const void *before_mix, *after_mix, *before_feed, *after_feed, *q_norm, *k_norm;  // those after are null where there is none
    int64_t heads, kv_heads, head_width, window;
    float scale, eps, offset;
    int rounds_first, is_gelu;
};

struct Step {
    int64_t tokens, requests, table_stride, page;
    const int64_t *slots, *tables, *starts, *contexts;
    int64_t threads;
};

void layer(const Calls* call, const Layer* l, const Step* s, void* x, void* keys, void* values, const void* cos, const void* sin) {
    static thread_local std::vector<T> kept;
    const int64_t tokens = s->tokens, width = l->qkv.width, q_width = l->heads * l->head_width, kv_width = l->kv_heads * l->head_width;
    const int64_t all = q_width + 2 * kv_width, inner = l->down.width;
    const int threads = static_cast<int>(s->threads);
    kept.resize(tokens * (2 * width + all + 2 * q_width + kv_width + 3 * inner));
    T *h = kept.data(), *y = h + tokens * width, *qkv = y + tokens * width, *q = qkv + tokens * all, *k = q + tokens * q_width;
    T *mixed = k + tokens * kv_width, *both = mixed + tokens * q_width, *act = both + tokens * 2 * inner;
    const auto norm = [&](const void* from, const void* weight, void* to) {
        call->rms_norm(from, weight, to, tokens, width, l->eps, l->offset, l->rounds_first, 1, threads);
    };
    const auto times = [&](const Matrix& m, const T* from, T* to) {
        if (m.scales) call->product_narrow(from, m.codes, m.factors, m.scales, m.sums, to, tokens, m.outputs, m.width, 1, threads);
        else call->product_bf16(from, m.codes, to, tokens, m.outputs, m.width, threads);
    };
    const auto turn = [&](const T* from, const void* weight, T* to, int64_t heads) {
        call->norm_rotate(from, weight, cos, sin, to, tokens, heads, l->head_width, all, l->eps, l->offset, l->rounds_first, 1, threads);
    };
    const auto into_x = [&](T* branch, const void* weight) {
        if (weight) norm(branch, weight, h);
        add(static_cast<T*>(x), weight ? h : branch, tokens * width, threads);
    };
    norm(x, l->before_mix, h);
    times(l->qkv, h, qkv);
    turn(qkv, l->q_norm, q, l->heads);
    turn(qkv + q_width, l->k_norm, k, l->kv_heads);
    call->paged_write(k, qkv + q_width + kv_width, keys, values, s->slots, tokens, kv_width, kv_width, all, 1);
    call->paged_attend(q, keys, values, mixed, s->tables, s->starts, s->contexts, s->table_stride, s->requests, l->heads, l->kv_heads,
                       l->head_width, s->page, l->window, q_width, l->scale, 1, threads);
    times(l->out, mixed, y);
    into_x(y, l->after_mix);
    norm(x, l->before_feed, h);
    times(l->gate_up, h, both);
    call->gated(both, both + inner, act, tokens, inner, 2 * inner, 2 * inner, l->is_gelu, 1, threads);
    times(l->down, act, y);
    into_x(y, l->after_feed);
}
}
