// Which of the instruction sets that kernels are compiled for is used.
#pragma once

#include <string>
#include <vector>

namespace aefast::cpu {

// The one in use.
std::string instruction_set();

// Those that this processor has, the best first; the first is used.
std::vector<std::string> supported_instruction_sets();

// From now on that one, in every thread; false if this processor lacks it. For tests.
bool use_instruction_set(const std::string& name);

}  // namespace aefast::cpu
