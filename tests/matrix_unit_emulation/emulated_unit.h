// Intel's AMX in software, for tests: included before a source, it takes the place of the compiler's intrinsics.
//
// Sums are rounded as the unit rounds them: even and odd terms of a row by themselves, in steps of a multiply-add to
// nearest, subnormal numbers being zeros before and after ("TDPBF16PS" in Intel's instruction set reference). What the
// unit refuses, such as tiles that were not configured or do not fit each other, ends the process.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace emulated_unit {

void load_config(const void* config);
void release();
void zero(int tile);
void load(int tile, const void* from, int64_t stride);
void store(int tile, void* to, int64_t stride);
void add_product(int sums, int left, int right);

}  // namespace emulated_unit

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ::emulated_unit::load_config(config)
#define _tile_release() ::emulated_unit::release()
#define _tile_zero(tile) ::emulated_unit::zero(tile)
#define _tile_loadd(tile, from, stride) ::emulated_unit::load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::emulated_unit::store(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) ::emulated_unit::add_product(sums, left, right)
