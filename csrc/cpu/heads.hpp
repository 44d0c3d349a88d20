// The heads of one token: read, RMS-norm, rotate, scale, round once, write.
//
// One call is one thread's work; the token loop (run.cpp) lays tokens and groups of heads over threads. An iteration
// holds kWidth pairs (neox: two vectors half a rotation apart; interleaved: one vector with its neighbours swapped), all
// loaded before anything is stored, so that a head may be rotated in place. With the norm a head is read twice, the
// second time from the first-level cache. Byte floor: each head read once and written once; cos and sin once a token.
#pragma once

#include "vec.hpp"

namespace ropool::cpu {
namespace {

template <class In, class Out, bool Interleaved, bool Norm>
struct HeadLoop {
    const Heads& call;
    const std::byte* src;
    std::byte* dst;
    float inverse_rms;
    Vec scale;

    // Whole: a full vector; otherwise the first n lanes.
    template <bool Whole>
    ROPOOL_INLINE Vec input(const HeadLoop& head, std::int64_t i, int n) {
        const Vec x = Whole ? load<In>(head.src, i) : load_part<In>(head.src, i, n);
        if constexpr (!Norm) return x;
        const std::byte* weight = bytes(head.call.weight);
        return x * head.inverse_rms * (Whole ? load<F32>(weight, i) : load_part<F32>(weight, i, n));
    }

    template <bool Whole>
    ROPOOL_INLINE void output(const HeadLoop& head, std::int64_t i, Vec v, int n) {
        if constexpr (Out::scaled) v = v / head.scale;
        if constexpr (Whole) store<Out>(head.dst, i, v);
        else store_part<Out>(head.dst, i, v, n);
    }

    template <bool Whole>
    ROPOOL_INLINE void rotate(const HeadLoop& head, std::int64_t i, int n) {
        const std::byte* cos_row = bytes(head.call.cos);
        const std::byte* sin_row = bytes(head.call.sin);
        const Vec cos = Whole ? load<F32>(cos_row, i) : load_part<F32>(cos_row, i, n);
        const Vec sin = Whole ? load<F32>(sin_row, i) : load_part<F32>(sin_row, i, n);
        const Vec first = input<Whole>(head, i, n);
        if constexpr (Interleaved) {
            output<Whole>(head, i, first * cos + swap_pairs(first) * sin, n);
        } else {
            const std::int64_t half = head.call.rotary_dim / 2;
            const Vec second = input<Whole>(head, half + i, n);
            output<Whole>(head, i, first * cos - second * sin, n);
            output<Whole>(head, half + i, second * cos + first * sin, n);
        }
    }

    template <bool Whole>
    ROPOOL_INLINE void pass(const HeadLoop& head, std::int64_t i, int n) {
        output<Whole>(head, i, input<Whole>(head, i, n), n);
    }

    float mean_square() const {
        Vec total = {};
        std::int64_t i = 0;
        for (; i + kWidth <= call.dim; i += kWidth) {
            const Vec x = load<In>(src, i);
            total += x * x;
        }
        if (i < call.dim) {
            const Vec x = load_part<In>(src, i, static_cast<int>(call.dim - i));
            total += x * x;
        }
        return sum(total) / static_cast<float>(call.dim);
    }

    void run() {
        if constexpr (Norm) inverse_rms = 1.0F / __builtin_sqrtf(mean_square() + call.eps);
        const std::int64_t rotations = Interleaved ? call.rotary_dim : call.rotary_dim / 2;
        std::int64_t i = 0;
        for (; i + kWidth <= rotations; i += kWidth) rotate<true>(*this, i, kWidth);
        if (i < rotations) rotate<false>(*this, i, static_cast<int>(rotations - i));
        for (i = call.rotary_dim; i + kWidth <= call.dim; i += kWidth) pass<true>(*this, i, kWidth);
        if (i < call.dim) pass<false>(*this, i, static_cast<int>(call.dim - i));
    }
};

template <class In, class Out, bool Interleaved, bool Norm>
void heads(const Heads& call) {
    for (std::int64_t h = 0; h < call.heads; ++h) {
        float scale = 1.0F;
        if (Out::scaled && call.scale != nullptr) {
            __builtin_memcpy(&scale, call.scale + h * call.scale_stride, sizeof(scale));
        }
        HeadLoop<In, Out, Interleaved, Norm>{call, call.src + h * call.src_stride, call.dst + h * call.dst_stride, 0.0F,
                                             broadcast(scale)}
            .run();
    }
}

template <class In, class Out>
HeadsFn heads_of(bool interleaved, bool norm) {
    if (interleaved) return norm ? heads<In, Out, true, true> : heads<In, Out, true, false>;
    return norm ? heads<In, Out, false, true> : heads<In, Out, false, false>;
}

template <class In>
HeadsFn heads_from(DType out, bool interleaved, bool norm) {
    switch (out) {
        case DType::f32: return heads_of<In, F32>(interleaved, norm);
        case DType::f16: return heads_of<In, F16>(interleaved, norm);
        case DType::bf16: return heads_of<In, BF16>(interleaved, norm);
        case DType::e4m3: return heads_of<In, E4M3>(interleaved, norm);
        case DType::e5m2: return heads_of<In, E5M2>(interleaved, norm);
        default: return nullptr;
    }
}

HeadsFn select_heads(DType in, DType out, bool interleaved, bool norm) {
    switch (in) {
        case DType::f32: return heads_from<F32>(out, interleaved, norm);
        case DType::f16: return heads_from<F16>(out, interleaved, norm);
        case DType::bf16: return heads_from<BF16>(out, interleaved, norm);
        default: return nullptr;
    }
}

}  // namespace
}  // namespace ropool::cpu
