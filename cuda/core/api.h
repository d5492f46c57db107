// The C interface, the same for the host's library and the device's.
//
// Arrays lie where the library computes; only lists of pointers and sizes (`const void* const*`,
// `const int64_t*`) are read by the host. `dtype` arguments are the codes of core/common.h. A
// `stream` is a cudaStream_t, ignored by the host's library. Functions return 0, or the cudaError_t
// of a launch; they wait for nothing.
#pragma once

#include <cstdint>

#define LOWRANK_API extern "C" __attribute__((visibility("default")))

// Which version of this interface the library has; changed with any signature.
#define LOWRANK_ABI 7

LOWRANK_API int lowrank_abi();
// What an error code means.
LOWRANK_API const char* lowrank_error(int code);
// Threads of the host's library, at least 1; ignored by the device's.
LOWRANK_API void lowrank_set_threads(int threads);
// How many devices the driver has, of which the host's library knows none. The result is the error
// with which the driver answered.
LOWRANK_API int lowrank_devices(int* count);
// Ten times the major and the minor number of a device's compute capability.
LOWRANK_API int lowrank_capability(int device, int* capability);
// Loads a kernel on the current device without a launch; the error says why none can run there.
LOWRANK_API int lowrank_probe();

// Block-wise 8-bit quantisation. `table` and `map` belong to one of the two dynamic maps; `zero` is
// the code of 0 in it.
LOWRANK_API int lowrank_quantize_blockwise(const void* x, int dtype, std::uint8_t* codes,
                                           float* absmax, std::int64_t numel, std::int64_t block,
                                           const std::int32_t* table, int zero, void* stream);
LOWRANK_API int lowrank_dequantize_blockwise(const std::uint8_t* codes, const float* absmax,
                                             void* out, int dtype, std::int64_t numel,
                                             std::int64_t block, const float* map, void* stream);

// Affine quantisation in groups, one code a byte; stochastic where `stochastic` is not 0.
LOWRANK_API int lowrank_quantize_groups(const void* x, int dtype, std::uint8_t* codes, void* scales,
                                        void* zeros, int scale_dtype, std::int64_t numel,
                                        std::int64_t group, int levels, int stochastic,
                                        std::uint64_t seed, std::uint64_t first, void* stream);
LOWRANK_API int lowrank_dequantize_groups(const std::uint8_t* codes, const void* scales,
                                          const void* zeros, int scale_dtype, void* out, int dtype,
                                          std::int64_t numel, std::int64_t group, void* stream);
// `count` tensors, all of the same types.
LOWRANK_API int lowrank_dequantize_groups_list(int count, const std::uint8_t* const* codes,
                                               const void* const* scales, const void* const* zeros,
                                               int scale_dtype, void* const* outs,
                                               const std::int64_t* numels, int dtype,
                                               std::int64_t group, void* stream);

// Four-bit quantisation in groups of an even size, two codes a byte. `zeros` is null in the
// symmetric formats. `share` is the scale over what a group spans; see core/groups.h.
LOWRANK_API int lowrank_quantize_int4(const void* x, int dtype, std::uint8_t* codes, void* scales,
                                      void* zeros, int scale_dtype, std::int64_t numel,
                                      std::int64_t group, int format, float share,
                                      const float* values, void* stream);
LOWRANK_API int lowrank_dequantize_int4(const std::uint8_t* codes, const void* scales,
                                        const void* zeros, int scale_dtype, void* out, int dtype,
                                        std::int64_t numel, std::int64_t group, int format,
                                        const float* values, void* stream);
// `count` tensors, all of the same types; `zeros` is null in the symmetric formats.
LOWRANK_API int lowrank_dequantize_int4_list(int count, const std::uint8_t* const* codes,
                                             const void* const* scales, const void* const* zeros,
                                             int scale_dtype, void* const* outs,
                                             const std::int64_t* numels, int dtype,
                                             std::int64_t group, int format, const float* values,
                                             void* stream);

// Signs from Philox: entry i is bit i % 128 of counter i / 128.
LOWRANK_API int lowrank_rademacher(void* out, int dtype, std::int64_t numel, std::uint64_t key,
                                   void* stream);
// Normal numbers from Philox: entry i is number (first + i) % 4 of counter (first + i) / 4. If not
// null, `device_key` points to one number where the library computes, which replaces `key`.
LOWRANK_API int lowrank_gaussian(void* out, int dtype, std::int64_t numel, std::uint64_t key,
                                 const std::int64_t* device_key, std::uint64_t first, void* stream);
// The same for `count` tensors of one type with a key each, times `scale`. If not null,
// `device_keys` has a pointer for each and replaces `keys`.
LOWRANK_API int lowrank_gaussian_list(int count, void* const* outs, const std::int64_t* numels,
                                      const std::uint64_t* keys,
                                      const std::int64_t* const* device_keys, int dtype,
                                      float scale, void* stream);
// Rounds fp32 to bf16 stochastically. If not null, `device_seed` points to one number where the
// library computes, which replaces `seed`; so it does in `lowrank_write_back*`.
LOWRANK_API int lowrank_stochastic_bfloat16(const float* x, std::uint16_t* out, std::int64_t numel,
                                            std::uint64_t seed, std::uint64_t first,
                                            const std::int64_t* device_seed, void* stream);
// `count` seeds that depend on step counts where the library computes: mixes *steps[i] and
// `purpose` into states[i], as `mix` of cuda/noise.py does. `states` are read by the host.
LOWRANK_API int lowrank_step_seeds(int count, const float* const* steps,
                                   const std::uint64_t* states, std::uint64_t purpose,
                                   std::int64_t* seeds, void* stream);

// Adam on `count` tensors of rows[i] x columns[i] entries: deltas = size * m / (sqrt(v) + eps).
// With `axis` 0 (1), grad_norms[i] and delta_norms[i] receive the norms of the columns (rows) of
// the gradient and of the delta; -1 for none. `device_sizes`, if not null, points to (eps, size) of
// each tensor, where the library computes, and replaces the arguments of those names.
LOWRANK_API int lowrank_adam(int count, const void* const* grads, void* const* exp_avgs,
                             void* const* exp_avg_sqs, void* const* deltas,
                             float* const* grad_norms, float* const* delta_norms,
                             const std::int64_t* rows, const std::int64_t* columns, int axis,
                             int grad_dtype, int state_dtype, int delta_dtype, double beta1,
                             double beta2, float eps, float size, const float* device_sizes,
                             void* stream);
// The same with block-wise 8-bit moments in blocks of 256 entries. `tables` and `maps` hold those
// of the signed map, then those of the unsigned one.
LOWRANK_API int lowrank_adam_8bit(int count, const void* const* grads, void* const* exp_avgs,
                                  float* const* exp_avg_absmax, void* const* exp_avg_sqs,
                                  float* const* exp_avg_sq_absmax, void* const* deltas,
                                  const std::int64_t* numels, int grad_dtype, int delta_dtype,
                                  double beta1, double beta2, float eps, float size,
                                  const float* device_sizes, const std::int32_t* tables,
                                  const float* maps, void* stream);

// Adam and the update of `count` weights in one pass: weight = keep * weight - alpha * delta, with
// the delta of `lowrank_adam`. Weights and gradients are of type `dtype`. `device_sizes`, if not
// null, points to (eps, size, keep, alpha) of each tensor, where the library computes. The gradient
// of a tensor whose size there is 0 counts as zero, even if it is NaN.
LOWRANK_API int lowrank_adam_weights(int count, void* const* weights, const void* const* grads,
                                     void* const* exp_avgs, void* const* exp_avg_sqs,
                                     const std::int64_t* numels, int dtype, int state_dtype,
                                     double beta1, double beta2, float eps, float size, float keep,
                                     float alpha, const float* device_sizes, void* stream);

// A cautious update of `rows` contiguous rows, with a momentum in codes of 4 or 8 `bits` and a
// scale for each 128 entries of a row: advances the momentum and writes the direction, masked where
// `cautious` is not 0. `share` is 1 - b1, `correction` 1 - b1^t, `each` 1 / columns. Entry (i, j)
// has position first + i * stride + j in the noise that rounds four bits.
LOWRANK_API int lowrank_cautious_rows(const void* grad, int dtype, std::uint8_t* codes,
                                      float* scales, const float* by_row, const float* by_column,
                                      float* direction, std::int64_t rows, std::int64_t columns,
                                      int bits, int cautious, float share, float eps,
                                      float correction, float each, std::uint64_t seed,
                                      std::uint64_t first, std::int64_t stride, void* stream);

// Fira's limiter on `count` norms: writes a factor for each and advances what stored[i] points to.
// Those without a flag in `good`, if that is not null, keep it and have a factor of 1.
LOWRANK_API int lowrank_limit_growth(int count, float* const* stored, const float* norms,
                                     const std::uint8_t* good, float* factors, float limit,
                                     void* stream);

// weight = keep * weight - alpha * delta - factor * grad on contiguous rows. `delta` or `grad` may
// be null. The factor of entry (i, j) is factors[i * row_stride + j * column_stride]; where it is 0
// nothing is taken of `grad`, not even NaN. bf16 weights are rounded stochastically where
// `stochastic` is not 0; `first` is the position of entry (0, 0). `device_sizes`, if not null,
// points to (keep, alpha) where the library computes, and replaces the arguments of those names.
LOWRANK_API int lowrank_write_back(void* weight, int dtype, const void* delta, int delta_dtype,
                                   const void* grad, int grad_dtype, const float* factors,
                                   std::int64_t row_stride, std::int64_t column_stride,
                                   std::int64_t rows, std::int64_t columns, float keep, float alpha,
                                   int stochastic, std::uint64_t seed, std::uint64_t first,
                                   const float* device_sizes, const std::int64_t* device_seed,
                                   void* stream);
// weight = keep * weight - factor * grad on `count` matrices of one shape, with fewer than 2^31
// entries, and one type.
LOWRANK_API int lowrank_write_back_list(int count, void* const* weights, const void* const* grads,
                                        const float* const* factors, int dtype,
                                        std::int64_t row_stride, std::int64_t column_stride,
                                        std::int64_t rows, std::int64_t columns, float keep,
                                        void* stream);
// `lowrank_write_back` on whole groups of an INT8 weight: groups that change get a new range and
// stochastic codes.
LOWRANK_API int lowrank_write_back_int8(std::uint8_t* codes, void* scales, void* zeros,
                                        int scale_dtype, const void* delta, int delta_dtype,
                                        const void* grad, int grad_dtype, const float* factors,
                                        std::int64_t row_stride, std::int64_t column_stride,
                                        std::int64_t rows, std::int64_t columns, std::int64_t group,
                                        float keep, float alpha, std::uint64_t seed,
                                        std::uint64_t first, const float* device_sizes,
                                        const std::int64_t* device_seed, void* stream);
// The same on whole groups of an even size of a weight in four bits: groups that change keep their
// scale while it fits. `turn` counts the roundings with this seed; `device_turn`, if not null,
// points to it where the library computes.
LOWRANK_API int lowrank_write_back_int4(
    std::uint8_t* codes, void* scales, int scale_dtype, const void* delta, int delta_dtype,
    const void* grad, int grad_dtype, const float* factors, std::int64_t row_stride,
    std::int64_t column_stride, std::int64_t rows, std::int64_t columns, std::int64_t group,
    float keep, float alpha, std::uint64_t seed, std::uint64_t first, std::int64_t turn,
    const float* device_sizes, const std::int64_t* device_turn, void* stream);
