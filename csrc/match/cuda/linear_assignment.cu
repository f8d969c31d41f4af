// linear_assignment: where the state of a problem lies, and the launch.
#include "common/cuda/launch.h"
#include "match/cuda/linear_assignment.cuh"

namespace tokred::cuda {

using namespace matching;

int64_t linear_assignment_workspace(const LinearAssignmentParams& p) {
  const AssignmentSize size(p);
  if (assignment_in_shared(size.rows, size.columns)) return 0;
  return p.batch * assignment_state_bytes(size.rows, size.columns);
}

void linear_assignment(const LinearAssignmentParams& p, Stream stream) {
  static_assert(sizeof(AssignmentScratch) <= kAssignmentScratch);
  const AssignmentSize size(p);
  const LaunchPlan plan = plan_assignment(p.batch, size.rows, size.columns);
  visit_dtype(p.dtype, [&]<class T>() { launch(linear_assignment_kernel<T>, plan, stream, p); });
}

}  // namespace tokred::cuda
