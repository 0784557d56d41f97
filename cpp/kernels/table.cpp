// This instruction set's kernels, by name.

#include "kernels.h"
#include "simd.h"

namespace zerofl {
namespace ISA {

#define KERNEL(result, name, parameters) result name parameters;
#include "signatures.inc"
#undef KERNEL

}  // namespace ISA

#define NAME_OF_(isa) #isa
#define NAME_OF(isa) NAME_OF_(isa)
#define TABLE_OF_(isa) kernels_##isa
#define TABLE_OF(isa) TABLE_OF_(isa)

extern const Kernels TABLE_OF(ISA) = {
    NAME_OF(ISA),
    ISA::LANES,
    ISA::LANES == 16 ? 4 : 2,
#define KERNEL(result, name, parameters) ISA::name,
#include "signatures.inc"
#undef KERNEL
};

}  // namespace zerofl
