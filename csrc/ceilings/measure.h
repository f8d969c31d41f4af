// Ceilings of the machine: how fast memory is read, copied and gathered from, and how many
// operations a second the processor does. Several rounds each, whose best is the ceiling.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tokred::ceilings {

// The work of one round, in bytes (a copy's are read and written) or operations, and the seconds of
// each. Rounds alternate between distances of the prefetch and between numbers of streams.
struct Rounds {
  int64_t work;
  std::vector<double> seconds;
};

// isa: generic, avx2 or avx512. Memory is mapped and first touched by the threads that read it, in
// huge pages where the system has them. All throw std::invalid_argument that names the argument.
Rounds measure_read(const std::string& isa, int64_t bytes, int64_t threads, int64_t rounds);
Rounds measure_copy(const std::string& isa, int64_t bytes, int64_t threads, int64_t rounds,
                    bool non_temporal);
// Every eighth row of a table, in order or shuffled; each round other rows.
Rounds measure_gather(const std::string& isa, int64_t table_bytes, int64_t row_bytes,
                      int64_t threads, int64_t rounds, bool shuffled);
// what: multiply_add, dot_int16 or dot_int8. work is 0 where the machine has no such instruction.
Rounds measure_operations(const std::string& isa, const std::string& what, int64_t steps,
                          int64_t threads, int64_t rounds);

}  // namespace tokred::ceilings
