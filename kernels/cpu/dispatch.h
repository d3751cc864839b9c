// Which of the instruction sets that kernels are compiled for is used.
#pragma once

#include <string>
#include <vector>

namespace aefast::cpu {

// The one in use.
std::string instruction_set();

// Those that this processor has, the best first; the first is used. One that does not pay on it is the last.
std::vector<std::string> supported_instruction_sets();

// Whether the kernels' vectors are wider than those of MKL, which torch's builds have for BLAS: on AMD's processors MKL
// keeps to the 16 registers of 256 bits. Zen 4 computes as many operations in a second of 256 bits as of 512, but 512 come
// with 32 registers.
bool has_wider_vectors_than_blas();

// Whether the processor is Intel's, for which MKL is made.
bool is_intel();

// Whether the processor has Intel's AMX for bfloat16, and the system keeps its state.
bool has_amx_bfloat16();

// That, with the vectors' instructions to round to bfloat16, and the system lets this process use it. Where the compiler
// knows them.
bool has_matrix_unit();

// Whether products of bfloat16 take less time than those of float32: by AMX, or by vectors, whose instructions for it
// multiply twice as many pairs as float32's. On Intel's processors that were made with AMX, which virtual machines may
// lack, such an instruction takes four times as long.
bool has_fast_bfloat16_products();

// From now on that one, in every thread; false if this processor lacks it. For tests.
bool use_instruction_set(const std::string& name);

}  // namespace aefast::cpu
