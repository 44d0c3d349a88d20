// The smaller per-token kernels: the cos/sin row, norm weights, the tiles of the 656-byte MLA row, streamed copies.
// Each handles one row on one thread and reads and writes each byte once.
#pragma once

#include "vec.hpp"

namespace ropool::cpu {
namespace {

template <class T>
void widen(const std::byte* src, float* dst, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store<F32>(bytes(dst), i, canonical_nan(load<T>(src, i)));
    if (i < count) {
        const int n = static_cast<int>(count - i);
        store_part<F32>(bytes(dst), i, canonical_nan(load_part<T>(src, i, n)), n);
    }
}

void select_widen(DType in, const std::byte* src, float* dst, std::int64_t count) {
    switch (in) {
        case DType::f16: return widen<F16>(src, dst, count);
        case DType::bf16: return widen<BF16>(src, dst, count);
        default: return widen<F32>(src, dst, count);
    }
}

// kWidth values (or n) of a table half, from one row or picked lane by lane from three.
template <class T, bool Whole>
ROPOOL_INLINE Vec table_values(const TableRow& row, std::int64_t column, std::int64_t i, int n) {
    const auto read = [&](const std::byte* p) {
        return bit_cast<Bits>(Whole ? load<T>(p, column + i) : load_part<T>(p, column + i, n));
    };
    const auto mask = [&](const std::uint32_t* p) {
        const auto* raw = reinterpret_cast<const std::byte*>(p + i);
        return Whole ? read_raw<Bits>(raw) : read_raw_part<Bits>(raw, n);
    };
    Bits values = read(row.rows[0]);
    if (row.mask1 != nullptr) {
        const Bits first = mask(row.mask1);
        const Bits second = mask(row.mask2);
        values = (values & ~(first | second)) | (read(row.rows[1]) & first) | (read(row.rows[2]) & second);
    }
    return bit_cast<Vec>(values);
}

// What the heads of bfloat16 models read a block at a time. Neox: the even, then the odd frequencies of the block.
// Interleaved: each frequency once, in the first half of its block's place.
template <class T, bool Interleaved>
ROPOOL_INLINE std::int64_t table_blocks(const TableRow& row) {
    const auto values = [&](std::int64_t column, std::int64_t i) {
        return canonical_nan(table_values<T, true>(row, column, i, kWidth));
    };
    std::int64_t i = 0;
    if constexpr (Interleaved) {
        for (; i + kWidth <= row.half; i += kWidth) {
            store<F32>(bytes(row.cos), 2 * i, values(0, i));
            store<F32>(bytes(row.sin), 2 * i, values(row.half, i));
        }
    } else {
        for (; i + kBlock <= row.half; i += kBlock) {
            const Two cos = deinterleave(values(0, i), values(0, i + kWidth));
            const Two sin = deinterleave(values(row.half, i), values(row.half, i + kWidth));
            store<F32>(bytes(row.cos), i, cos.even);
            store<F32>(bytes(row.cos), i + kWidth, cos.odd);
            store<F32>(bytes(row.sin), i, sin.even);
            store<F32>(bytes(row.sin), i + kWidth, sin.odd);
        }
    }
    return i;
}

template <class T, bool Interleaved, bool Whole>
ROPOOL_INLINE void table_step(const TableRow& row, std::int64_t i, int n) {
    const Vec cos = table_values<T, Whole>(row, 0, i, n);
    const Vec sin = table_values<T, Whole>(row, row.half, i, n);
    if constexpr (Interleaved) {
        for (int lane = 0; lane < (Whole ? kWidth : n); ++lane) {
            row.cos[2 * (i + lane)] = row.cos[2 * (i + lane) + 1] = cos[lane];
            row.sin[2 * (i + lane)] = -sin[lane];
            row.sin[2 * (i + lane) + 1] = sin[lane];
        }
    } else if constexpr (Whole) {
        store<F32>(bytes(row.cos), i, cos);
        store<F32>(bytes(row.sin), i, sin);
    } else {
        store_part<F32>(bytes(row.cos), i, cos, n);
        store_part<F32>(bytes(row.sin), i, sin, n);
    }
}

template <class T, bool Interleaved, bool Blocks>
void table(const TableRow& row) {
    std::int64_t i = Blocks ? table_blocks<T, Interleaved>(row) : 0;
    for (; i + kWidth <= row.half; i += kWidth) table_step<T, Interleaved, true>(row, i, kWidth);
    if (i < row.half) table_step<T, Interleaved, false>(row, i, static_cast<int>(row.half - i));
}

template <class T>
TableFn table_from(DType model, bool interleaved) {
    if (model == DType::bf16) return interleaved ? table<T, true, true> : table<T, false, true>;
    return interleaved ? table<T, true, false> : table<T, false, false>;
}

TableFn select_table(DType dtype, DType model, bool interleaved) {
    switch (dtype) {
        case DType::f32: return table_from<F32>(model, interleaved);
        case DType::f16: return table_from<F16>(model, interleaved);
        case DType::bf16: return table_from<BF16>(model, interleaved);
        default: return nullptr;
    }
}

template <class In>
void tiles(const std::byte* src, std::byte* dst, std::byte* scales, std::int64_t dim) {
    constexpr std::int64_t tile = 128;
    constexpr float float_max = 0x1.fffffep127F;
    for (std::int64_t start = 0; start < dim; start += tile) {
        Vec largest = {};
        for (std::int64_t i = start; i < start + tile; i += kWidth) {
            const Vec x = magnitude(load<In>(src, i));
            largest = x > largest ? x : largest;  // false for NaN, which is thereby ignored
        }
        float amax = 0.0F;
        for (int lane = 0; lane < kWidth; ++lane) amax = largest[lane] > amax ? largest[lane] : amax;
        float scale = (amax < float_max ? amax : float_max) / 448.0F;
        scale = scale > 0x1p-126F ? scale : 0x1p-126F;
        __builtin_memcpy(scales + start / tile * 4, &scale, sizeof(scale));
        const Vec divisor = broadcast(scale);
        for (std::int64_t i = start; i < start + tile; i += kWidth) store<E4M3>(dst, i, load<In>(src, i) / divisor);
    }
}

void select_tiles(DType in, const std::byte* src, std::byte* dst, std::byte* scales, std::int64_t dim) {
    switch (in) {
        case DType::f16: return tiles<F16>(src, dst, scales, dim);
        case DType::bf16: return tiles<BF16>(src, dst, scales, dim);
        default: return tiles<F32>(src, dst, scales, dim);
    }
}

void stream_copy(std::byte* dst, const std::byte* src, std::int64_t bytes) {
    for (std::int64_t i = 0; i < bytes; i += 64) stream_line(dst + i, src + i);
}

void stream_fence() { fence(); }

constexpr Kernels kKernels = {select_heads, select_table, select_tiles, select_widen, stream_copy, stream_fence};

}  // namespace
}  // namespace ropool::cpu
