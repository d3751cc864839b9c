// Compiled once per instruction set; AEFAST_INSTRUCTION_SET names the namespace of each copy.
#include "sparse.h"

#include "lanes.h"

namespace aefast::cpu::AEFAST_INSTRUCTION_SET {
namespace {

template <typename T>
constexpr int64_t kWidth = kVectorBytes / sizeof(Accumulator<T>);
template <typename T>
using Wide = Vector<Accumulator<T>>;

template <typename A>
AEFAST_HD Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

template <typename T>
AEFAST_HD Wide<T> read_wide(const T* from) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    return read<Wide<T>>(from);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = read<Vector<uint16_t, kVectorBytes / 2>>(from);
    return reinterpret_cast<Wide<T>>(__builtin_convertvector(bits, Vector<uint32_t>) << 16);
  } else {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(read<Vector<uint16_t, kVectorBytes / 2>>(from)));
#else
    Accumulator<T> values[kWidth<T>];
#pragma omp simd
    for (int64_t lane = 0; lane < kWidth<T>; ++lane) values[lane] = load(from[lane]);
    return read<Wide<T>>(values);
#endif
  }
}

template <typename T>
AEFAST_HD void write_wide(T* to, Wide<T> value) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    write(to, value);
  } else {
    Accumulator<T> values[kWidth<T>];
    write(values, value);
#pragma omp simd
    for (int64_t lane = 0; lane < kWidth<T>; ++lane) to[lane] = store<T>(values[lane]);
  }
}

// The first `valid` lanes; those read beyond them are 0.
template <typename T>
AEFAST_HD Wide<T> read_wide(const T* from, int64_t valid) {
  T padded[kWidth<T>] = {};
  for (int64_t lane = 0; lane < valid; ++lane) padded[lane] = from[lane];
  return read_wide(padded);
}

template <typename T>
AEFAST_HD void write_wide(T* to, Wide<T> value, int64_t valid) {
  T padded[kWidth<T>];
  write_wide(padded, value);
  for (int64_t lane = 0; lane < valid; ++lane) to[lane] = padded[lane];
}

template <typename A>
AEFAST_HD A sum_of(Vector<A> vector) {
  constexpr int64_t kCount = kVectorBytes / sizeof(A);
  A lanes[kCount];
  write(lanes, vector);
  for (int64_t half = kCount / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Asks for `bytes` from there on, for the second-level cache.
AEFAST_HD void ask_for(const void* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64)
    __builtin_prefetch(static_cast<const char*>(from) + byte, 0, 2);
}

// --- rows ------------------------------------------------------------------------------------------------------

// Of kVectors vectors of columns from `col` on, whose sums stay in registers; the last has `valid` lanes.
template <typename T, int kVectors, bool kIsWhole>
AEFAST_HD void sum_columns(const T* rows, int64_t stride, const T* coefficients, const int64_t* indices,
                           const int64_t* next, int64_t count, const T* bias, T* out, int64_t col, int64_t valid) {
  const auto read_at = [&](const T* row, int vector) {
    const T* const from = row + col + vector * kWidth<T>;
    return kIsWhole ? read_wide(from) : read_wide(from, valid);
  };
  Wide<T> sums[kVectors];
  for (int vector = 0; vector < kVectors; ++vector) sums[vector] = bias ? read_at(bias, vector) : Wide<T>{};
  for (int64_t j = 0; j < count; ++j) {
    if (next && next[j] >= 0) ask_for(rows + next[j] * stride + col, kVectors * kWidth<T> * sizeof(T));
    if (indices[j] < 0) continue;
    const Wide<T> coefficient = broadcast(load(coefficients[j]));
    for (int vector = 0; vector < kVectors; ++vector)
      sums[vector] += coefficient * read_at(rows + indices[j] * stride, vector);
  }
  for (int vector = 0; vector < kVectors; ++vector) {
    T* const to = out + col + vector * kWidth<T>;
    if constexpr (kIsWhole)
      write_wide(to, sums[vector]);
    else
      write_wide(to, sums[vector], valid);
  }
}

template <typename T>
void weighted_sum_of(const Rows& rows, const T* coefficients, const int64_t* indices, const int64_t* next, int64_t count,
                     const T* bias, T* out) {
  constexpr int kVectors = 8;
  const T* const data = static_cast<const T*>(rows.data);
  int64_t col = 0;
  for (; col + kVectors * kWidth<T> <= rows.cols; col += kVectors * kWidth<T>)
    sum_columns<T, kVectors, true>(data, rows.stride, coefficients, indices, next, count, bias, out, col, kWidth<T>);
  for (; col + kWidth<T> <= rows.cols; col += kWidth<T>)
    sum_columns<T, 1, true>(data, rows.stride, coefficients, indices, next, count, bias, out, col, kWidth<T>);
  if (col < rows.cols)
    sum_columns<T, 1, false>(data, rows.stride, coefficients, indices, next, count, bias, out, col, rows.cols - col);
}

void weighted_sum(const Rows& rows, const void* coefficients, const int64_t* indices, const int64_t* next, int64_t count,
                  const void* bias, void* out) {
  with_type(rows.scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    weighted_sum_of<T>(rows, static_cast<const T*>(coefficients), indices, next, count, static_cast<const T*>(bias),
                       static_cast<T*>(out));
  });
}

// --- latents ---------------------------------------------------------------------------------------------------

// Entries whose rows are added to one sum before that is added to the total: rounding errors of many entries grow with
// the root of their number then.
constexpr int64_t kTogether = 256;

// kRows entries: sums += Σ coefficient row, and their dots with `direction`. Sums and direction have whole vectors, of
// zeros beyond the columns. How many rows are taken at once changes no result.
template <typename T, int kRows, bool kHasSums, bool kHasDots>
AEFAST_HD void add_rows(const Rows& rows, const Latent& latent, const int64_t* places, int64_t ahead,
                        const Accumulator<T>* direction, Accumulator<T>* sums) {
  const T* const data = static_cast<const T*>(rows.data);
  const T *from[kRows], *next[kRows];
  Wide<T> coefficients[kRows], dots[kRows];
  for (int row = 0; row < kRows; ++row) {
    from[row] = data + places[row] / latent.per_row * rows.stride;
    next[row] = kRows + row < ahead ? data + places[kRows + row] / latent.per_row * rows.stride : from[row];
    if constexpr (kHasSums)
      coefficients[row] = broadcast(load(static_cast<const T*>(latent.coefficients)[places[row]]));
    dots[row] = Wide<T>{};
  }
  const auto add = [&](int64_t col, const auto& read_from) {
    Wide<T> sum = kHasSums ? read<Wide<T>>(sums + col) : Wide<T>{};
    for (int row = 0; row < kRows; ++row) {
      const Wide<T> values = read_from(from[row] + col);
      if constexpr (kHasSums) sum += coefficients[row] * values;
      if constexpr (kHasDots) dots[row] += read<Wide<T>>(direction + col) * values;
    }
    if constexpr (kHasSums) write(sums + col, sum);
  };
  int64_t col = 0;
  for (; col + kWidth<T> <= rows.cols; col += kWidth<T>) {
    for (int row = 0; row < kRows; ++row) __builtin_prefetch(next[row] + col, 0, 2);
    add(col, [](const T* at) { return read_wide(at); });
  }
  if (col < rows.cols) add(col, [&](const T* at) { return read_wide(at, rows.cols - col); });
  if constexpr (kHasDots)
    for (int row = 0; row < kRows; ++row)
      static_cast<T*>(latent.dots)[places[row]] = store<T>(sum_of<Accumulator<T>>(dots[row]));
}

template <typename T, bool kHasSums, bool kHasDots>
void latent_of(const Rows& rows, const Latent& latent) {
  using A = Accumulator<T>;
  constexpr int kRows = 4;
  const int64_t padded = (rows.cols + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
  A *const sums = static_cast<A*>(latent.workspace), *const totals = sums + padded, *const direction = totals + padded;
  if constexpr (kHasDots) {
    for (int64_t col = 0; col < padded; col += kWidth<T>) {
      const T* const from = static_cast<const T*>(latent.direction) + col;
      const int64_t valid = rows.cols - col;
      write(direction + col, valid >= kWidth<T> ? read_wide(from) : read_wide(from, valid));
    }
  }
  if constexpr (kHasSums)
    for (int64_t col = 0; col < padded; col += kWidth<T>) write(totals + col, Wide<T>{});
  for (int64_t begin = 0; begin < latent.count; begin += kTogether) {
    const int64_t end = begin + kTogether < latent.count ? begin + kTogether : latent.count;
    if constexpr (kHasSums)
      for (int64_t col = 0; col < padded; col += kWidth<T>) write(sums + col, Wide<T>{});
    int64_t entry = begin;
    for (; entry + kRows <= end; entry += kRows)
      add_rows<T, kRows, kHasSums, kHasDots>(rows, latent, latent.places + entry, latent.count + latent.ahead - entry,
                                             direction, sums);
    for (; entry < end; ++entry)
      add_rows<T, 1, kHasSums, kHasDots>(rows, latent, latent.places + entry, latent.count + latent.ahead - entry,
                                         direction, sums);
    if constexpr (kHasSums)
      for (int64_t col = 0; col < padded; col += kWidth<T>)
        write(totals + col, read<Wide<T>>(totals + col) + read<Wide<T>>(sums + col));
  }
  if constexpr (kHasSums) {
    T* const gradient = static_cast<T*>(latent.gradient);
    int64_t col = 0;
    for (; col + kWidth<T> <= rows.cols; col += kWidth<T>) write_wide(gradient + col, read<Wide<T>>(totals + col));
    if (col < rows.cols) write_wide(gradient + col, read<Wide<T>>(totals + col), rows.cols - col);
  }
}

void latent(const Rows& rows, const Latent& latent) {
  with_type(rows.scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (latent.gradient && latent.dots)
      latent_of<T, true, true>(rows, latent);
    else if (latent.gradient)
      latent_of<T, true, false>(rows, latent);
    else if (latent.dots)
      latent_of<T, false, true>(rows, latent);
  });
}

// --- the largest -----------------------------------------------------------------------------------------------

template <typename P, typename T>
void pre_activations_of(const P* product, const T* bias, int64_t count, Accumulator<T>* out) {
  using A = Accumulator<T>;
  const auto element = [&](int64_t at) {
    const A sum = static_cast<A>(load(product[at])) + (bias ? load(bias[at]) : A(0));
    if constexpr (std::is_same_v<T, A>)
      return sum;
    else
      return load(store<T>(sum));
  };
#pragma omp simd
  for (int64_t at = 0; at < count; ++at) out[at] = element(at);
}

void pre_activations(Scalar product_scalar, Scalar scalar, const void* product, const void* bias, int64_t count,
                     void* out) {
  with_type(scalar, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    if (product_scalar == scalar)
      pre_activations_of(static_cast<const T*>(product), static_cast<const T*>(bias), count, static_cast<A*>(out));
    else
      pre_activations_of(static_cast<const A*>(product), static_cast<const T*>(bias), count, static_cast<A*>(out));
  });
}

template <typename A>
void group_maxima_of(const A* elements, int64_t count, int64_t groups, A* out) {
  const Vector<A> least = broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t group = 0; group < groups; group += kWidth<A>) write(out + group, least);
  int64_t at = 0;
  for (; at + groups <= count; at += groups)
    for (int64_t group = 0; group < groups; group += kWidth<A>) {
      const auto one = read<Vector<A>>(elements + at + group), other = read<Vector<A>>(out + group);
      write(out + group, one > other ? one : other);
    }
  for (int64_t group = 0; at + group < count; ++group)
    if (elements[at + group] > out[group]) out[group] = elements[at + group];
}

void group_maxima(bool is_double, const void* elements, int64_t count, int64_t groups, void* out) {
  if (is_double)
    group_maxima_of(static_cast<const double*>(elements), count, groups, static_cast<double*>(out));
  else
    group_maxima_of(static_cast<const float*>(elements), count, groups, static_cast<float*>(out));
}

// A bit for each lane that is not at most the threshold's.
template <typename A>
AEFAST_HD uint32_t not_at_most(Vector<A> elements, Vector<A> threshold) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, double>)
    return _mm512_cmp_pd_mask(elements, threshold, _CMP_NLE_UQ);
  else
    return _mm512_cmp_ps_mask(elements, threshold, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, double>)
    return _mm256_movemask_pd(_mm256_cmp_pd(elements, threshold, _CMP_NLE_UQ));
  else
    return _mm256_movemask_ps(_mm256_cmp_ps(elements, threshold, _CMP_NLE_UQ));
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<A, double>)
    return _mm_movemask_pd(_mm_cmpnle_pd(elements, threshold));
  else
    return _mm_movemask_ps(_mm_cmpnle_ps(elements, threshold));
#else
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kWidth<A>; ++lane) bits |= (elements[lane] <= threshold[lane] ? 0u : 1u) << lane;
  return bits;
#endif
}

template <typename A>
int64_t above_of(const A* elements, int64_t count, A threshold, int32_t* out) {
  const Vector<A> limit = broadcast(threshold);
  int64_t found = 0, at = 0;
  for (; at + kWidth<A> <= count; at += kWidth<A>)
    for (uint32_t bits = not_at_most<A>(read<Vector<A>>(elements + at), limit); bits; bits &= bits - 1)
      out[found++] = static_cast<int32_t>(at + __builtin_ctz(bits));
  for (; at < count; ++at)
    if (!(elements[at] <= threshold)) out[found++] = static_cast<int32_t>(at);
  return found;
}

int64_t above(bool is_double, const void* elements, int64_t count, double threshold, int32_t* out) {
  if (is_double) return above_of(static_cast<const double*>(elements), count, threshold, out);
  return above_of(static_cast<const float*>(elements), count, static_cast<float>(threshold), out);
}

}  // namespace

extern const SparseKernels sparse_kernels;
const SparseKernels sparse_kernels = {weighted_sum, latent, pre_activations, group_maxima, above};

}  // namespace aefast::cpu::AEFAST_INSTRUCTION_SET
