// An operator's argument of type str. It takes the place of std::string, of which torch's own conversion leaks a copy at
// every call.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <string>
#include <utility>

namespace aefast {

struct String : std::string {
  explicit String(std::string text) : std::string(std::move(text)) {}
};

}  // namespace aefast

template <>
struct torch::stable::detail::ToImpl<aefast::String> {
  // What else torch says of a value matters to lists alone.
  template <typename... Rest>
  static aefast::String call(StableIValue value, Rest...) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    bool is_read = torch_string_length(handle, &length) == AOTI_TORCH_SUCCESS &&
                   torch_string_c_str(handle, &data) == AOTI_TORCH_SUCCESS;
    std::string text(is_read ? data : "", is_read ? length : 0);
    is_read = torch_delete_string(handle) == AOTI_TORCH_SUCCESS && is_read;
    STD_TORCH_CHECK(is_read, "an argument of type str cannot be read");
    return aefast::String(std::move(text));
  }
};
