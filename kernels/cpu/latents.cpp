#include "latents.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

#include "dense.h"
#include "parallel.h"

namespace aefast::cpu {
namespace {

// Places of the entries with the same latent lie side by side, in order: those of latent f from starts[f] on.
struct Ordered {
  std::vector<int64_t> starts;  // F + 1
  std::vector<int64_t> places;
};

// Counts, and then places, by parts of the code. However many parts there are, the order is one.
Ordered ordered(const Code& code, void* dots, int64_t element_size) {
  constexpr int64_t kLeastOfPart = 1 << 13;
  const int64_t entries = code.rows * code.per_row, latents = code.latents;
  const int64_t parts = std::clamp<int64_t>(std::min(entries / kLeastOfPart, entries / std::max<int64_t>(1, latents)), 1,
                                            static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t length = (entries + parts - 1) / parts;
  std::vector<int64_t> cursors(parts * latents);
  std::atomic<bool> has_wrong{false};
  for_each(parts, [&](int64_t part) {
    int64_t* const counts = cursors.data() + part * latents;
    for (int64_t place = part * length; place < std::min(entries, (part + 1) * length); ++place) {
      const int64_t latent = code.indices[place];
      if (latent >= latents)
        has_wrong = true;
      else if (latent >= 0)
        ++counts[latent];
      else if (dots)
        std::memset(static_cast<char*>(dots) + place * element_size, 0, element_size);
    }
  });
  STD_TORCH_CHECK(!has_wrong, "indices must be less than ", latents);
  Ordered out;
  out.starts.resize(latents + 1);
  int64_t total = 0;
  for (int64_t latent = 0; latent < latents; ++latent) {
    out.starts[latent] = total;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = cursors[part * latents + latent];
      cursors[part * latents + latent] = total;
      total += count;
    }
  }
  out.starts[latents] = total;
  out.places.resize(total);
  for_each(parts, [&](int64_t part) {
    int64_t* const at = cursors.data() + part * latents;
    for (int64_t place = part * length; place < std::min(entries, (part + 1) * length); ++place)
      if (const int64_t latent = code.indices[place]; latent >= 0) out.places[at[latent]++] = place;
  });
  return out;
}

// body(a null pointer to the type).
template <typename Body>
void with_type(Scalar scalar, const Body& body) {
  switch (scalar) {
    case Scalar::float32: return body(static_cast<float*>(nullptr));
    case Scalar::float64: return body(static_cast<double*>(nullptr));
    case Scalar::bfloat16: return body(static_cast<BFloat16*>(nullptr));
    case Scalar::float16: return body(static_cast<Float16*>(nullptr));
  }
}

void sum_values(Scalar scalar, const void* values, const int64_t* places, int64_t count, void* out, int64_t latent) {
  with_type(scalar, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    double sum = 0.0;
    for (int64_t entry = 0; entry < count; ++entry)
      sum += static_cast<double>(load(static_cast<const T*>(values)[places[entry]]));
    static_cast<T*>(out)[latent] = store<T>(static_cast<Accumulator<T>>(sum));
  });
}

}  // namespace

Tensor row_major_indices(const Tensor& indices) {
  STD_TORCH_CHECK(indices.dim() == 2 && indices.scalar_type() == torch::headeronly::ScalarType::Long,
                  "indices must be a matrix of int64");
  return torch::stable::contiguous(indices);
}

Code code_of(const Tensor& values, const Tensor& indices, int64_t latents, const Tensor& like) {
  check_matrix("values", values, indices.size(0), indices.size(1), like);
  return {values.const_data_ptr(), static_cast<const int64_t*>(indices.const_data_ptr()), indices.size(0),
          indices.size(1), latents};
}

Rows rows_of(const Tensor& tensor, Tensor& copy) {
  copy = tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
  return {scalar_of(copy), copy.const_data_ptr(), copy.stride(0), copy.size(1)};
}

void latent_gradients(const Rows& rows, const Code& code, const LatentGradients& gradients) {
  const int64_t size = size_of(rows.scalar), latents = code.latents;
  const Ordered order = ordered(code, gradients.dots, size);
  const int64_t entries = static_cast<int64_t>(order.places.size());
  // A task has so many entries and latents, or one latent with more. Its share of the entries is a stretch of the
  // latents, which are passed as if each had an entry more.
  constexpr int64_t kMostTasks = 64;
  const int64_t each = std::max((entries + latents + kMostTasks - 1) / kMostTasks,
                                rows_of_task(rows.cols, 1));
  const auto first_latent = [&](int64_t task) {
    int64_t low = 0, high = latents;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (order.starts[middle] + middle < task * each)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  for_each((entries + latents + each - 1) / each, [&](int64_t task) {
    std::vector<double> workspace(latent_workspace(rows.cols));
    const int64_t end = first_latent(task + 1);
    for (int64_t latent = first_latent(task); latent < end; ++latent) {
      const int64_t begin = order.starts[latent], count = order.starts[latent + 1] - begin;
      const int64_t* const places = order.places.data() + begin;
      const int64_t ahead = order.starts[end] - order.starts[latent + 1];
      Latent its{places, count, ahead, code.per_row, code.values, nullptr, nullptr, nullptr, workspace.data()};
      if (gradients.dots) {
        its.dots = gradients.dots;
        its.direction = static_cast<const char*>(gradients.directions.data) + latent * gradients.directions.stride * size;
      }
      if (gradients.weight.data) its.gradient = gradients.weight.row_block(latent, 1).data;
      sparse_kernels().latent(rows, its);
      if (gradients.bias.data) sum_values(rows.scalar, code.values, places, count, gradients.bias.data, latent);
    }
  });
}

bool is_dense(const Code& code, Scalar scalar) {
  // Processors that have instructions for products in bfloat16 have none for sums.
  const int64_t share = scalar == Scalar::bfloat16 && has_bfloat16_products() ? 32 : 8;
  return code.latents > 0 && code.per_row * share >= code.latents;
}

bool is_finite(const Matrix& matrix) {
  std::atomic<bool> is_finite{true};
  with_type(matrix.scalar, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Word = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    constexpr Word kExponent = sizeof(T) == 8                ? static_cast<Word>(0x7ff0000000000000)
                               : sizeof(T) == 4              ? static_cast<Word>(0x7f800000)
                               : std::is_same_v<T, BFloat16> ? static_cast<Word>(0x7f80)
                                                             : static_cast<Word>(0x7c00);
    const Matrix lines = matrix.row_stride == 1 ? matrix.transposed() : matrix;
    for_tasks(lines.rows, lines.cols, 1, [&](int64_t first, int64_t count) {
      // As wide as an element, so that vectors of them are looked at.
      Word has_other = 0;
      const auto look = [&](const T* data, auto stride) {
        for (int64_t col = 0; col < lines.cols; ++col) {
          Word word;
          std::memcpy(&word, data + col * stride, sizeof(T));
          has_other |= static_cast<Word>((word & kExponent) == kExponent);
        }
      };
      for (int64_t row = first; row < first + count; ++row) {
        const auto* const data = static_cast<const T*>(lines.row_block(row, 1).data);
        lines.col_stride == 1 ? look(data, std::integral_constant<int64_t, 1>()) : look(data, lines.col_stride);
      }
      if (has_other) is_finite = false;
    });
  });
  return is_finite;
}

Tensor dense_code(const Code& code, const Tensor& like) {
  const Tensor out = new_matrix(like, code.rows, code.latents);
  std::atomic<bool> has_wrong{false};
  with_type(scalar_of(like), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    T* const data = static_cast<T*>(out.mutable_data_ptr());
    const T* const values = static_cast<const T*>(code.values);
    for_tasks(code.rows, code.latents, 1, [&](int64_t first, int64_t count) {
      std::memset(static_cast<void*>(data + first * code.latents), 0, count * code.latents * sizeof(T));
      for (int64_t row = first; row < first + count; ++row) {
        T* const elements = data + row * code.latents;
        const int64_t begin = row * code.per_row, end = begin + code.per_row;
        bool has_twice = false;
        for (int64_t place = begin; place < end; ++place) {
          const int64_t latent = code.indices[place];
          if (latent < 0) continue;
          if (latent >= code.latents) {
            has_wrong = true;
            continue;
          }
          const A before = load(elements[latent]);
          has_twice |= before != A(0);
          elements[latent] = store<T>(before + load(values[place]));
        }
        if (std::is_same_v<T, A> || !has_twice) continue;
        // In half precision no sum is rounded before its last term.
        std::vector<A> sums(code.latents);
        for (int64_t place = begin; place < end; ++place)
          if (const int64_t latent = code.indices[place]; 0 <= latent && latent < code.latents)
            sums[latent] += load(values[place]);
        std::transform(sums.begin(), sums.end(), elements, [](A sum) { return store<T>(sum); });
      }
    });
  });
  STD_TORCH_CHECK(!has_wrong, "indices must be less than ", code.latents);
  return out;
}

void decode(const Rows& directions, const Code& code, const void* bias, void* out) {
  const int64_t size = size_of(directions.scalar), per_row = code.per_row;
  std::atomic<bool> has_wrong{false};
  for_tasks(code.rows, per_row * directions.cols, 1, [&](int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t* const indices = code.indices + row * per_row;
      // The next row's have not been looked at: what is asked for need not exist.
      if (std::any_of(indices, indices + per_row, [&](int64_t latent) { return latent >= code.latents; })) {
        has_wrong = true;
        continue;
      }
      sparse_kernels().weighted_sum(directions, static_cast<const char*>(code.values) + row * per_row * size, indices,
                                    row + 1 < code.rows ? indices + per_row : nullptr, per_row, bias,
                                    static_cast<char*>(out) + row * directions.cols * size);
    }
  });
  STD_TORCH_CHECK(!has_wrong, "indices must be less than ", code.latents);
}

}  // namespace aefast::cpu
