// Which CPUs have which memory near.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace kt {

// CPUs that have some memory nearer than others have it. The number is the system's; below 0: memory that is nowhere.
struct NumaNode {
  int number;
  std::vector<int> cpus;
};

// The nodes of these CPUs, in the order of their numbers, as <root>/node*/cpulist has them; those without any of the CPUs
// are left out. One node, number -1, with all of the CPUs where that cannot be read or leaves a CPU out.
std::vector<NumaNode> numa_nodes(const std::vector<int>& cpus, const std::string& root = "/sys/devices/system/node");

// Where a thread of a pool belongs, and the CPUs that it may run on; none: it is left to the system.
struct ThreadPlace {
  int node;  // index
  std::vector<int> cpus;
};

// `threads` over the nodes, in proportion to their CPUs and in their order; each node has one at least, as there must be
// as many threads. A thread has a CPU of its own where there are as many CPUs as threads, else all those of its node; on
// one node that would be no restriction, and it has none.
std::vector<ThreadPlace> place_threads(const std::vector<NumaNode>& nodes, int threads);

// Has pages that are not there yet come from this node's memory, as long as it has any. Best effort: elsewhere they are
// only slower.
void prefer_node(void* data, size_t bytes, int number);

}  // namespace kt
