// This instruction set's kernels, by name.

#include "kernels.h"
#include "simd.h"

namespace zerofl {
namespace ISA {

void convolve(const Convolution&, const float*, const float*, const float*, float*, int, int, int, int, float*,
              float*);
void weight_gradient(const WeightGradient&, const float*, float*, int, int, int, float*, float*);
void linear_gradient(const WeightGradient&, const float*, float*, int, int, int, float*, float*);
void linear_forward(const uint32_t*, const float*, int64_t, uint32_t, const float*, int, float, float*);
void linear_grad_input(const uint32_t*, const float*, int64_t, uint32_t, const float*, int, float*);
int64_t find_active(const float*, int64_t, float, uint32_t*, float*);
int64_t partition(const float*, int64_t, float, float, float*, int64_t*);
int64_t active_bits(const float*, const float*, float, int64_t, uint8_t*);
void batch_norm_statistics(const float*, int64_t, float*, float*);
void batch_norm_apply(const float*, const float*, int64_t, float, float, float, bool, bool, float*, uint8_t*);
void batch_norm_sums(const float*, const float*, const uint8_t*, int64_t, float, float*, float*);
void batch_norm_gradient(const float*, const float*, const uint8_t*, int64_t, float, float, float, float, bool, float*,
                         float*);
void max_pool(const float*, int, int, int, int, bool, float*, uint8_t*);
void max_pool_gradient(const float*, const uint8_t*, int, int, int, int, float*);

}  // namespace ISA

#define NAME_OF_(isa) #isa
#define NAME_OF(isa) NAME_OF_(isa)
#define TABLE_OF_(isa) kernels_##isa
#define TABLE_OF(isa) TABLE_OF_(isa)

extern const Kernels TABLE_OF(ISA) = {
    NAME_OF(ISA),
    ISA::LANES,
    ISA::LANES == 16 ? 4 : 2,
    ISA::convolve,
    ISA::weight_gradient,
    ISA::linear_gradient,
    ISA::linear_forward,
    ISA::linear_grad_input,
    ISA::find_active,
    ISA::partition,
    ISA::active_bits,
    ISA::batch_norm_statistics,
    ISA::batch_norm_apply,
    ISA::batch_norm_sums,
    ISA::batch_norm_gradient,
    ISA::max_pool,
    ISA::max_pool_gradient,
};

}  // namespace zerofl
