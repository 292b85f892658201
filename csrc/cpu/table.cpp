// The table of one instruction set's kernels; compiled once per set, like the kernels.
#include "kernels.h"

#ifndef IDAP_ISA
#error "IDAP_ISA must name the instruction set"
#endif

#define IDAP_STRING_(x) #x
#define IDAP_STRING(x) IDAP_STRING_(x)
#define IDAP_JOIN_(a, b) a##b
#define IDAP_JOIN(a, b) IDAP_JOIN_(a, b)

namespace idap {
namespace IDAP_ISA {

size_t channel_stats_scratch(const View&);
void channel_stats(const View&, Activation, bool, double*, double*, int, const NormAct*);
size_t pair_stats_scratch(const PairView&);
void pair_stats(const PairView&, double*, double*, int);
void filter_norms(const View*, double* const*, int, int);
uint64_t read_memory(const void*, size_t, int);

}  // namespace IDAP_ISA

const Kernels* IDAP_JOIN(kernels_, IDAP_ISA)() {
  static const Kernels table = {
      IDAP_STRING(IDAP_ISA),    &IDAP_ISA::channel_stats_scratch,
      &IDAP_ISA::channel_stats, &IDAP_ISA::pair_stats_scratch,
      &IDAP_ISA::pair_stats,    &IDAP_ISA::filter_norms,
      &IDAP_ISA::read_memory,
  };
  return &table;
}

}  // namespace idap
