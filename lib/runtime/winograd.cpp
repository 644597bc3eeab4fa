// 3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016, arXiv 1509.09308, section
// 4), and batch normalization joined with ReLU, in bfloat16 on a CPU with AVX512-BF16.
//
// Images are N x H x W x C in memory (channels last). A tile is 4 x 4 input pixels that give 2 x 2 output
// pixels; tiles overlap by two. With d a tile of one channel, g a filter, Y the outputs,
//
//     Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A
//
// with 16 products for 4 outputs, in place of 36. The gradient of the filter, from the gradients y of 2 x 2,
//
//     dg = G^T [ sum over tiles of (B^T d B) * (A y A^T) ] G
//
// The sums are 16 matrix products, one for each position in a tile: bfloat16 times bfloat16 with float32
// sums. All else is computed in float32 from the values as they lie in memory.
//
// lib/winograd.py says which layers come here, and documents the functions.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <tuple>
#include <vector>

#define ALWAYS_INLINE \
  inline __attribute__((always_inline))  // 10% of the time, where the compiler thinks otherwise

namespace {

using bf16 = uint16_t;
using Reals = __m512;  // 16 float32

constexpr int64_t kPositions = 16;   // of a tile
constexpr int64_t kLanes = 16;       // channels in a register
constexpr int64_t kOutputs = 32;     // columns of a matrix product: two registers
constexpr int64_t kTogether = 3;     // tiles by 4 positions by 2 registers: 24 sums, of 32 registers
constexpr int64_t kOuterRows = 8;    // rows of a product that sums over tiles; channels are a multiple
constexpr int64_t kTiles = 48;       // held at a time: their transforms stay in the second cache
constexpr int64_t kOuterTiles = 64;  // the same for the gradient of the filters
constexpr int64_t kChunk = 64;       // pixels whose sums are float32 before they are added in double

ALWAYS_INLINE Reals load(const bf16* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

ALWAYS_INLINE void store(bf16* p, Reals values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(values));
}

// Two tiles beside one another, channel by channel: what a product that sums over tiles reads as one number.
ALWAYS_INLINE void store_pair(bf16* p, Reals even, Reals odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
}

ALWAYS_INLINE int pair_at(const bf16* p) { return *reinterpret_cast<const int*>(p); }

// sums + x[2i] b[2i] + x[2i + 1] b[2i + 1], for the 16 columns of b and one pair of x
ALWAYS_INLINE Reals add_products(Reals sums, int pair, __m512i b) {
  return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}

bf16* data(const at::Tensor& x) { return reinterpret_cast<bf16*>(x.data_ptr()); }

at::Tensor scratch(int64_t workers, int64_t size, at::ScalarType type) {
  return at::empty({workers, size}, at::TensorOptions().dtype(type));
}

// Share `count` pieces of work among the threads, always in the same way: the order of sums is part of the
// result.
void share(int64_t count, const std::function<void(int64_t worker, int64_t first, int64_t last)>& work) {
  const int64_t workers = at::get_num_threads();
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      work(worker, count * worker / workers, count * (worker + 1) / workers);
  });
}

// The same for work whose pieces are independent of one another: a thread that is held up leaves more to the
// others.
void share_freely(int64_t count, const std::function<void(int64_t worker, int64_t piece)>& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = at::get_num_threads();
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t piece = next++; piece < count; piece = next++) work(worker, piece);
  });
}

// ---------------------------------------------------------------------------------------- images and tiles

struct Images {
  const bf16* data;
  int64_t number, height, width, channels;

  Images(const at::Tensor& x)
      : data(::data(x)), number(x.size(0)), height(x.size(2)), width(x.size(3)), channels(x.size(1)) {}
  int64_t tiles_across() const { return width / 2; }
  int64_t tile_rows() const { return number * height / 2; }  // of all images, one after the other
  // the upper left pixel that row `row` of tiles gives
  int64_t offset(int64_t row) const { return 2 * row * width * channels; }
};

void check(const at::Tensor& x, const char* name) {
  TORCH_CHECK(
      x.dim() == 4 && x.scalar_type() == at::kBFloat16 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
      name, ": takes N x C x H x W in bfloat16, channels last");
}

void check_tiles(const at::Tensor& x, const char* name) {
  check(x, name);
  TORCH_CHECK(x.size(1) % kLanes == 0 && x.size(2) % 2 == 0 && x.size(3) % 4 == 0, name,
              ": takes channels in multiples of 16, heights of 2, widths of 4");
}

// B^T times four pixels, one below the other.
ALWAYS_INLINE void transform_column(const bf16* const rows[4], int64_t offset, Reals out[4]) {
  const Reals d0 = load(rows[0] + offset), d1 = load(rows[1] + offset);
  const Reals d2 = load(rows[2] + offset), d3 = load(rows[3] + offset);
  out[0] = d0 - d2;
  out[1] = d1 + d2;
  out[2] = d2 - d1;
  out[3] = d1 - d3;
}

// B^T d B of one row of tiles, zeros around the image, two tiles at a time:
// put(position, number of the first tile, channel, 16 values of the first tile, of the second).
template <class Put>
ALWAYS_INLINE void transform_images(const Images& x, int64_t row, const bf16* zeros, Put put) {
  const int64_t per_image = x.height / 2, top = 2 * (row % per_image) - 1;
  const bf16* image = x.data + row / per_image * x.height * x.width * x.channels;
  const bf16* rows[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t y = top + i;
    rows[i] = y < 0 || y >= x.height ? zeros : image + y * x.width * x.channels;
  }
  for (int64_t channel = 0; channel < x.channels; channel += kLanes) {
    Reals d[6][4];  // columns; the next two tiles begin with the last two
    for (int i = 0; i < 4; ++i) d[0][i] = _mm512_setzero_ps();
    transform_column(rows, channel, d[1]);
    for (int64_t tile = 0; tile < x.tiles_across(); tile += 2) {
      const int64_t at = (2 * tile + 1) * x.channels + channel;
      for (int column = 2; column < 5; ++column)
        transform_column(rows, at + (column - 2) * x.channels, d[column]);
      if (tile + 2 < x.tiles_across())
        transform_column(rows, at + 3 * x.channels, d[5]);
      else
        for (int i = 0; i < 4; ++i) d[5][i] = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        put(4 * i, tile, channel, d[0][i] - d[2][i], d[2][i] - d[4][i]);
        put(4 * i + 1, tile, channel, d[1][i] + d[2][i], d[3][i] + d[4][i]);
        put(4 * i + 2, tile, channel, d[2][i] - d[1][i], d[4][i] - d[3][i]);
        put(4 * i + 3, tile, channel, d[1][i] - d[3][i], d[3][i] - d[5][i]);
        d[0][i] = d[4][i];
        d[1][i] = d[5][i];
      }
    }
  }
}

// --------------------------------------------------------------------------------------------- convolution

int64_t padded(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs * kOutputs; }

// G g G^T of all filters, in the order of the products: 16 x padded outputs / 32 x inputs / 2 x 32 x 2, zeros
// where there is no output. `backward`: of the convolution that gives the gradient of the input, whose
// filters are turned round and have inputs for outputs.
at::Tensor transform_filters(const at::Tensor& weight, bool backward) {
  const int64_t first = weight.size(0), second = weight.size(1);
  const int64_t inputs = backward ? first : second, outputs = backward ? second : first;
  at::Tensor w =
      weight.permute({0, 2, 3, 1}).to(at::kFloat).reshape({first, 9 * second});  // as they lie: no copy
  if (!backward) w = w.t().contiguous();                                         // outputs last in both
  const int64_t next_place = backward ? -outputs : inputs * outputs,
                next_input = backward ? 9 * outputs : outputs;
  const float* from = w.data_ptr<float>() + (backward ? 8 * outputs : 0);
  at::Tensor packed = at::empty({kPositions, padded(outputs) * inputs}, at::kBFloat16);
  if (padded(outputs) != outputs) packed.zero_();
  bf16* to = data(packed);
  at::parallel_for(0, inputs / 2, 4, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair)
      for (int64_t o = 0; o < outputs; o += kLanes) {
        Reals u[2][4][4];
        for (int i = 0; i < 2; ++i) {
          const float* g = from + (2 * pair + i) * next_input + o;
          Reals half[4][3];
          for (int x = 0; x < 3; ++x) {
            const Reals g0 = _mm512_loadu_ps(g + x * next_place),
                        g1 = _mm512_loadu_ps(g + (3 + x) * next_place);
            const Reals g2 = _mm512_loadu_ps(g + (6 + x) * next_place), ends = g0 + g2;
            half[0][x] = g0;
            half[1][x] = (ends + g1) * 0.5f;
            half[2][x] = (ends - g1) * 0.5f;
            half[3][x] = g2;
          }
          for (int y = 0; y < 4; ++y) {
            const Reals ends = half[y][0] + half[y][2];
            u[i][y][0] = half[y][0];
            u[i][y][1] = (ends + half[y][1]) * 0.5f;
            u[i][y][2] = (ends - half[y][1]) * 0.5f;
            u[i][y][3] = half[y][2];
          }
        }
        bf16* place = to + o / kOutputs * kOutputs * inputs + (pair * kOutputs + o % kOutputs) * 2;
        for (int p = 0; p < kPositions; ++p)
          store_pair(place + p * packed.size(1), u[0][p / 4][p % 4], u[1][p / 4][p % 4]);
      }
  });
  return packed;
}

// The products of one column of positions, for `tiles` tiles and 32 outputs, and the vertical half of A^T m A
// at once, while they are in registers: out is 2 x tiles x 32. `step_a`, `step_b`: numbers between the rows
// of positions; `step_out`: between the upper and the lower half.
template <int64_t tiles>
void column_of_products(const bf16* a, int64_t step_a, int64_t inputs, const bf16* b, int64_t step_b,
                        float* out, int64_t step_out) {
  Reals m[4][tiles][2];
#pragma GCC unroll 4
  for (int64_t y = 0; y < 4; ++y)
#pragma GCC unroll 3
    for (int64_t t = 0; t < tiles; ++t) m[y][t][0] = m[y][t][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < inputs; i += 2) {
#pragma GCC unroll 4
    for (int64_t y = 0; y < 4; ++y) {
      const bf16* from = b + y * step_b + i * kOutputs;
      const __m512i b0 = _mm512_loadu_si512(from), b1 = _mm512_loadu_si512(from + 32);
#pragma GCC unroll 3
      for (int64_t t = 0; t < tiles; ++t) {
        const int pair = pair_at(a + y * step_a + t * inputs + i);
        m[y][t][0] = add_products(m[y][t][0], pair, b0);
        m[y][t][1] = add_products(m[y][t][1], pair, b1);
      }
    }
  }
#pragma GCC unroll 3
  for (int64_t t = 0; t < tiles; ++t)
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      float* to = out + t * kOutputs + half * kLanes;
      _mm512_storeu_ps(to, m[0][t][half] + (m[1][t][half] + m[2][t][half]));
      _mm512_storeu_ps(to + step_out, (m[1][t][half] - m[2][t][half]) - m[3][t][half]);
    }
}

// The horizontal half: 2 x 2 pixels of 16 channels. m holds upper and lower of the first column of positions,
// then of the second, each `step` numbers after the one before.
ALWAYS_INLINE void store_outputs(const float* m, int64_t step, bf16* out, int64_t next_pixel,
                                 int64_t next_row) {
  for (int64_t y = 0; y < 2; ++y, m += step, out += next_row) {
    const Reals m0 = _mm512_loadu_ps(m), m1 = _mm512_loadu_ps(m + 2 * step);
    const Reals m2 = _mm512_loadu_ps(m + 4 * step), m3 = _mm512_loadu_ps(m + 6 * step);
    store(out, m0 + (m1 + m2));
    store(out + next_pixel, (m1 - m2) - m3);
  }
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, bool backward) {
  check_tiles(input, "winograd::convolution");
  const int64_t inputs = input.size(1), outputs = weight.size(backward ? 1 : 0);
  TORCH_CHECK(weight.dim() == 4 && weight.size(backward ? 0 : 1) == inputs && outputs % kLanes == 0 &&
                  weight.size(2) == 3 && weight.size(3) == 3,
              "winograd::convolution: takes filters of outputs x inputs x 3 x 3, outputs in multiples of 16");
  const at::Tensor filters = transform_filters(weight, backward);
  at::Tensor output = at::empty({input.size(0), outputs, input.size(2), input.size(3)}, input.options(),
                                at::MemoryFormat::ChannelsLast);
  const Images x(input), y(output);
  const int64_t across = x.tiles_across(), per_block = std::max<int64_t>(1, kTiles / across);
  const int64_t most = per_block * across, blocks = (x.tile_rows() + per_block - 1) / per_block;
  const at::Tensor zeros = at::zeros({x.width * inputs}, at::kBFloat16);
  const at::Tensor held = scratch(at::get_num_threads(), kPositions * most * inputs, at::kBFloat16);
  const at::Tensor products = scratch(at::get_num_threads(), kPositions / 2 * most * kOutputs, at::kFloat);
  share_freely(blocks, [&](int64_t worker, int64_t block) {
    bf16* v = data(held) + worker * held.size(1);
    float* m = products.data_ptr<float>() + worker * products.size(1);
    const int64_t first = block * per_block, rows = std::min(per_block, x.tile_rows() - first);
    for (int64_t r = 0; r < rows; ++r)
      transform_images(x, first + r, data(zeros),
                       [=, to = v + r * across * inputs, step = most * inputs](
                           int position, int64_t tile, int64_t channel, Reals first, Reals second)
                           __attribute__((always_inline)) {
                             bf16* place = to + position * step + tile * inputs + channel;
                             store(place, first);
                             store(place + inputs, second);
                           });
    for (int64_t o = 0; o < outputs; o += kOutputs) {
      const int64_t step_a = 4 * most * inputs, step_b = 4 * filters.size(1), step_out = most * kOutputs;
      for (int64_t p = 0; p < 4; ++p) {
        const bf16 *a = v + p * most * inputs, *b = data(filters) + p * filters.size(1) + o * inputs;
        float* to = m + p * 2 * step_out;
        int64_t t = 0;
        for (; t + kTogether <= rows * across; t += kTogether)
          column_of_products<kTogether>(a + t * inputs, step_a, inputs, b, step_b, to + t * kOutputs,
                                        step_out);
        for (; t < rows * across; ++t)
          column_of_products<1>(a + t * inputs, step_a, inputs, b, step_b, to + t * kOutputs, step_out);
      }
      for (int64_t r = 0; r < rows; ++r) {
        bf16* out = data(output) + y.offset(first + r) + o;
        const float* from = m + r * across * kOutputs;
        for (int64_t tile = 0; tile < across; ++tile, out += 2 * outputs, from += kOutputs) {
          store_outputs(from, step_out, out, outputs, y.width * outputs);
          if (o + kLanes < outputs)
            store_outputs(from + kLanes, step_out, out + kLanes, outputs, y.width * outputs);
        }
      }
    }
  });
  return output;
}

// --------------------------------------------------------------------------------- gradient of the filters

// A y A^T of two tiles beside one another, for 16 channels, as pairs. `step`: numbers between positions.
ALWAYS_INLINE void transform_gradients(const bf16* y, int64_t next_pixel, int64_t next_row, bf16* out,
                                       int64_t step) {
  Reals half[2][4][2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // columns: two of each tile
    const Reals upper = load(y + i * next_pixel), lower = load(y + next_row + i * next_pixel);
    half[i / 2][0][i % 2] = upper;
    half[i / 2][1][i % 2] = upper + lower;
    half[i / 2][2][i % 2] = upper - lower;
    half[i / 2][3][i % 2] = -lower;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, out += 4 * step) {
    const Reals a0 = half[0][i][0], a1 = half[0][i][1], b0 = half[1][i][0], b1 = half[1][i][1];
    store_pair(out, a0, b0);
    store_pair(out + step, a0 + a1, b0 + b1);
    store_pair(out + 2 * step, a0 - a1, b0 - b1);
    store_pair(out + 3 * step, -a1, -b1);
  }
}

// out (8 x 32 of a matrix with `outputs` columns) += a^T b over pairs of tiles
void outer_product(const bf16* a, int64_t inputs, const bf16* b, int64_t outputs, int64_t pairs, float* out) {
  Reals sums[kOuterRows][2];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kOuterRows; ++r) {
    sums[r][0] = _mm512_loadu_ps(out + r * outputs);
    sums[r][1] = _mm512_loadu_ps(out + r * outputs + kLanes);
  }
  for (int64_t t = 0; t < pairs; ++t, a += 2 * inputs, b += 2 * outputs) {
    const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 32);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kOuterRows; ++r) {
      const int pair = pair_at(a + 2 * r);
      sums[r][0] = add_products(sums[r][0], pair, b0);
      sums[r][1] = add_products(sums[r][1], pair, b1);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kOuterRows; ++r) {
    _mm512_storeu_ps(out + r * outputs, sums[r][0]);
    _mm512_storeu_ps(out + r * outputs + kLanes, sums[r][1]);
  }
}

// G^T m G, m the sum over workers (workers x 16 x inputs x outputs): the gradient of outputs x inputs x 3 x 3
// filters. In channels-last order, as the filters themselves are.
at::Tensor transform_back(const at::Tensor& sums) {
  const int64_t workers = sums.size(0), inputs = sums.size(2), outputs = sums.size(3);
  const float* from = sums.data_ptr<float>();
  at::Tensor gradient = at::empty({outputs, inputs, 3, 3}, at::TensorOptions().dtype(at::kFloat),
                                  at::MemoryFormat::ChannelsLast);
  float* to = gradient.data_ptr<float>();
  at::parallel_for(0, inputs, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t o = 0; o < outputs; o += kLanes) {
        Reals m[4][4], half[3][4];
        for (int64_t p = 0; p < kPositions; ++p) {
          Reals sum = _mm512_setzero_ps();
          for (int64_t w = 0; w < workers; ++w)
            sum += _mm512_loadu_ps(from + ((w * kPositions + p) * inputs + i) * outputs + o);
          m[p / 4][p % 4] = sum;
        }
        for (int x = 0; x < 4; ++x) {
          const Reals sum = (m[1][x] + m[2][x]) * 0.5f, difference = (m[1][x] - m[2][x]) * 0.5f;
          half[0][x] = m[0][x] + sum;
          half[1][x] = difference;
          half[2][x] = sum + m[3][x];
        }
        for (int y = 0; y < 3; ++y) {
          const Reals sum = (half[y][1] + half[y][2]) * 0.5f, difference = (half[y][1] - half[y][2]) * 0.5f;
          const Reals row[3] = {half[y][0] + sum, difference, sum + half[y][3]};
          for (int x = 0; x < 3; ++x)
            for (int64_t lane = 0; lane < kLanes; ++lane)
              to[((o + lane) * 9 + 3 * y + x) * inputs + i] = row[x][lane];
        }
      }
  });
  return gradient;
}

at::Tensor filter_gradient(const at::Tensor& input, const at::Tensor& gradient) {
  check_tiles(input, "winograd::filter_gradient");
  check_tiles(gradient, "winograd::filter_gradient");
  const Images x(input), y(gradient);
  TORCH_CHECK(x.number == y.number && x.height == y.height && x.width == y.width,
              "winograd::filter_gradient: takes inputs and gradients of one size");
  TORCH_CHECK(y.channels % kOutputs == 0, "winograd::filter_gradient: takes outputs in multiples of 32");
  const int64_t inputs = x.channels, outputs = y.channels, across = x.tiles_across();
  const int64_t per_block = std::max<int64_t>(1, kOuterTiles / across), most = per_block * across;
  const int64_t blocks = (x.tile_rows() + per_block - 1) / per_block, workers = at::get_num_threads();
  const at::Tensor zeros = at::zeros({x.width * inputs}, at::kBFloat16);
  const at::Tensor held = scratch(workers, kPositions * most * (inputs + outputs), at::kBFloat16);
  const at::Tensor sums = at::zeros({workers, kPositions, inputs, outputs}, at::kFloat);
  share(blocks, [&](int64_t worker, int64_t begin, int64_t end) {
    bf16* v = data(held) + worker * held.size(1);
    bf16* e = v + kPositions * most * inputs;
    float* m = sums.data_ptr<float>() + worker * kPositions * inputs * outputs;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * per_block, rows = std::min(per_block, x.tile_rows() - first);
      for (int64_t r = 0; r < rows; ++r) {
        transform_images(x, first + r, data(zeros),
                         [=, to = v + r * across * inputs, step = most * inputs](
                             int position, int64_t tile, int64_t channel, Reals first, Reals second)
                             __attribute__((always_inline)) {
                               store_pair(to + position * step + tile * inputs + 2 * channel, first, second);
                             });
        for (int64_t channel = 0; channel < outputs; channel += kLanes)
          for (int64_t tile = 0; tile < across; tile += 2)
            transform_gradients(y.data + y.offset(first + r) + 2 * tile * outputs + channel, outputs,
                                y.width * outputs, e + (r * across + tile) * outputs + 2 * channel,
                                most * outputs);
      }
      for (int64_t p = 0; p < kPositions; ++p)
        for (int64_t o = 0; o < outputs; o += kOutputs)
          for (int64_t i = 0; i < inputs; i += kOuterRows)
            outer_product(v + p * most * inputs + 2 * i, inputs, e + p * most * outputs + 2 * o, outputs,
                          rows * across / 2, m + (p * inputs + i) * outputs + o);
    }
  });
  return transform_back(sums);
}

// ---------------------------------------------------------------------------- batch normalization and ReLU

// Two sums over all pixels for each channel, in double: `adder(channel)` gives a function of (offset of 16
// channels of a pixel, first sum, second sum) that adds to the sums.
template <class Adder>
std::vector<double> two_sums(int64_t pixels, int64_t channels, Adder adder) {
  const int64_t workers = at::get_num_threads();
  std::vector<double> sums(workers * 2 * channels, 0.0);
  share((pixels + kChunk - 1) / kChunk, [&](int64_t worker, int64_t begin, int64_t end) {
    double* mine = sums.data() + worker * 2 * channels;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, last = std::min(pixels, first + kChunk);
      for (int64_t channel = 0; channel < channels; channel += kLanes) {
        const auto add = adder(channel);
        Reals a = _mm512_setzero_ps(), b = a, other_a = a,
              other_b = a;  // an addition need not wait for the last one
        int64_t pixel = first;
        for (; pixel + 1 < last; pixel += 2) {
          add(pixel * channels + channel, a, b);
          add((pixel + 1) * channels + channel, other_a, other_b);
        }
        if (pixel < last) add(pixel * channels + channel, a, b);
        float lanes[2][kLanes];
        _mm512_storeu_ps(lanes[0], a + other_a);
        _mm512_storeu_ps(lanes[1], b + other_b);
        for (int64_t i = 0; i < kLanes; ++i) {
          mine[channel + i] += lanes[0][i];
          mine[channels + channel + i] += lanes[1][i];
        }
      }
    }
  });
  for (int64_t i = 2 * channels; i < workers * 2 * channels; ++i) sums[i % (2 * channels)] += sums[i];
  return sums;
}

// f(channel) gives a function of the offset of 16 channels of a pixel.
template <class F>
void for_each_pixel(int64_t pixels, int64_t channels, F f) {
  share((pixels + kChunk - 1) / kChunk, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t first = begin * kChunk; first < std::min(pixels, end * kChunk); first += kChunk)
      for (int64_t channel = 0; channel < channels; channel += kLanes) {
        const auto visit = f(channel);
        for (int64_t pixel = first; pixel < std::min(pixels, first + kChunk); ++pixel)
          visit(pixel * channels + channel);
      }
  });
}

// The normalized value is x * scale + offset.
struct Affine {
  std::vector<float> scale, offset;

  Affine(const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& mean,
         const at::Tensor& inverse_std)
      : scale(weight.numel()), offset(weight.numel()) {
    for (size_t i = 0; i < scale.size(); ++i) {
      scale[i] = weight.data_ptr<float>()[i] * inverse_std.data_ptr<float>()[i];
      offset[i] = bias.data_ptr<float>()[i] - mean.data_ptr<float>()[i] * scale[i];
    }
  }
};

void check_normalization(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check(x, "winograd::batch_norm_relu");
  for (const at::Tensor& one : {weight, bias})
    TORCH_CHECK(one.scalar_type() == at::kFloat && one.is_contiguous() && one.numel() == x.size(1),
                "winograd::batch_norm_relu: takes a float32 weight and bias for each channel");
  TORCH_CHECK(x.size(1) % kLanes == 0 && x.numel() > 0,
              "winograd::batch_norm_relu: takes channels in multiples of 16");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_relu(const at::Tensor& input,
                                                               const at::Tensor& weight,
                                                               const at::Tensor& bias, double eps) {
  check_normalization(input, weight, bias);
  const int64_t channels = input.size(1), pixels = input.numel() / channels;
  const bf16* x = data(input);
  // relative to the first pixel: squares of numbers far from zero would lose what their differences are
  const auto sums = two_sums(pixels, channels, [=](int64_t channel) {
    const Reals first = load(x + channel);
    return [=](int64_t at, Reals& sum, Reals& squares) {
      const Reals value = load(x + at) - first;
      sum += value;
      squares = _mm512_fmadd_ps(value, value, squares);
    };
  });
  const at::Tensor mean = at::empty({channels}, at::kFloat), variance = at::empty({channels}, at::kFloat);
  for (int64_t i = 0; i < channels; ++i) {
    const double shifted = sums[i] / pixels;
    mean.data_ptr<float>()[i] = shifted + c10::detail::f32_from_bits(x[i]);
    variance.data_ptr<float>()[i] = std::max(0.0, sums[channels + i] / pixels - shifted * shifted);
  }
  const Affine affine(weight, bias, mean, (variance + eps).rsqrt());
  at::Tensor output = at::empty_like(input);
  bf16* y = data(output);
  for_each_pixel(pixels, channels, [&](int64_t channel) {
    const Reals scale = _mm512_loadu_ps(&affine.scale[channel]),
                offset = _mm512_loadu_ps(&affine.offset[channel]);
    // of two numbers one of which is none, max gives the second: NaN stays NaN
    return [=](int64_t at) {
      store(y + at, _mm512_max_ps(_mm512_setzero_ps(), _mm512_fmadd_ps(load(x + at), scale, offset)));
    };
  });
  return {output, mean, variance};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_relu_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean, const at::Tensor& variance, double eps) {
  check_normalization(input, weight, bias);
  check(gradient, "winograd::batch_norm_relu_backward");
  const int64_t channels = input.size(1), pixels = input.numel() / channels;
  const bf16 *x = data(input), *dy = data(gradient);
  const at::Tensor inverse_std = (variance + eps).rsqrt();
  const Affine affine(weight, bias, mean, inverse_std);
  const float *means = mean.data_ptr<float>(), *inverse = inverse_std.data_ptr<float>();
  // what ReLU lets through: 0 where the output was 0
  const auto passed = [=](Reals value, int64_t at, Reals scale, Reals offset) {
    const Reals normalized = _mm512_fmadd_ps(value, scale, offset);
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(normalized, _mm512_setzero_ps(), _CMP_GT_OQ),
                               load(dy + at));
  };
  const auto sums = two_sums(pixels, channels, [&](int64_t channel) {
    const Reals scale = _mm512_loadu_ps(&affine.scale[channel]),
                offset = _mm512_loadu_ps(&affine.offset[channel]);
    const Reals center = _mm512_loadu_ps(means + channel);
    return [=](int64_t at, Reals& sum, Reals& with_input) {
      const Reals value = load(x + at), g = passed(value, at, scale, offset);
      sum += g;
      with_input = _mm512_fmadd_ps(g, value - center, with_input);
    };
  });
  // dx = scale (g - mean(g) - x^ mean(g x^)), x^ the standardized input: a line in x beside scale * g
  at::Tensor d_weight = at::empty({channels}, at::kFloat), d_bias = at::empty({channels}, at::kFloat);
  std::vector<float> slope(channels), level(channels);
  for (int64_t i = 0; i < channels; ++i) {
    const double with_standardized = sums[channels + i] * inverse[i];
    d_bias.data_ptr<float>()[i] = sums[i];
    d_weight.data_ptr<float>()[i] = with_standardized;
    slope[i] = -affine.scale[i] * inverse[i] * with_standardized / pixels;
    level[i] = -affine.scale[i] * sums[i] / pixels - slope[i] * means[i];
  }
  at::Tensor d_input = at::empty_like(input);
  bf16* dx = data(d_input);
  for_each_pixel(pixels, channels, [&](int64_t channel) {
    const Reals scale = _mm512_loadu_ps(&affine.scale[channel]),
                offset = _mm512_loadu_ps(&affine.offset[channel]);
    const Reals a = _mm512_loadu_ps(&slope[channel]), b = _mm512_loadu_ps(&level[channel]);
    return [=](int64_t at) {
      const Reals value = load(x + at), g = passed(value, at, scale, offset);
      store(dx + at, _mm512_fmadd_ps(scale, g, _mm512_fmadd_ps(value, a, b)));
    };
  });
  return {d_input, d_weight, d_bias};
}

}  // namespace

TORCH_LIBRARY(winograd, library) {
  library.def("convolution(Tensor input, Tensor weight, bool backward) -> Tensor");
  library.def("filter_gradient(Tensor input, Tensor gradient) -> Tensor");
  library.def(
      "batch_norm_relu(Tensor input, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  library.def(
      "batch_norm_relu_backward(Tensor gradient, Tensor input, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor variance, float eps) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(winograd, CPU, library) {
  library.impl("convolution", convolution);
  library.impl("filter_gradient", filter_gradient);
  library.impl("batch_norm_relu", batch_norm_relu);
  library.impl("batch_norm_relu_backward", batch_norm_relu_backward);
}
