// The four kernels of one instruction set, as a table.
#include "kernels.h"

#define OPENMSA_TEXT(x) #x
#define OPENMSA_NAME(x) OPENMSA_TEXT(x)

namespace openmsa::OPENMSA_ISA {

bool select(const SelectArguments&);
bool attend(const AttendArguments&);
bool attend_backward(const AttendBackwardArguments&);
bool index_loss(const IndexLossArguments&);

extern const Kernels table;
const Kernels table{OPENMSA_NAME(OPENMSA_ISA), select, attend, attend_backward, index_loss};

}  // namespace openmsa::OPENMSA_ISA
