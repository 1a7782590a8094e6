#include "cpu/numa.h"

#include <dirent.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <string_view>

namespace kt {
namespace {

constexpr std::string_view kPrefix = "node";
constexpr int kMostNumbers = 1024;

bool parse(std::string_view text, int& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size() && number >= 0;
}

// "0-3,8" and the like; those of `wanted` only.
bool parse_list(std::string_view text, const std::set<int>& wanted, std::vector<int>& cpus) {
  while (!text.empty()) {
    const std::string_view part = text.substr(0, text.find(','));
    text.remove_prefix(std::min(part.size() + 1, text.size()));
    const size_t dash = part.find('-');
    int first = 0, last = 0;
    if (!parse(part.substr(0, dash), first)) return false;
    last = first;
    if (dash != std::string_view::npos && !parse(part.substr(dash + 1), last)) return false;
    for (auto cpu = wanted.lower_bound(first); cpu != wanted.end() && *cpu <= last; ++cpu) cpus.push_back(*cpu);
  }
  return true;
}

std::vector<int> numbers_in(const std::string& root) {
  std::vector<int> numbers;
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(opendir(root.c_str()), closedir);
  if (folder == nullptr) return numbers;
  while (const dirent* entry = readdir(folder.get())) {
    const std::string_view name = entry->d_name;
    int number = 0;
    if (name.starts_with(kPrefix) && parse(name.substr(kPrefix.size()), number) && number < kMostNumbers)
      numbers.push_back(number);
  }
  std::ranges::sort(numbers);
  return numbers;
}

}  // namespace

std::vector<NumaNode> numa_nodes(const std::vector<int>& cpus, const std::string& root) {
  const std::vector<NumaNode> one = {{-1, cpus}};
  const std::set<int> wanted(cpus.begin(), cpus.end());
  std::vector<NumaNode> nodes;
  size_t found = 0;
  for (const int number : numbers_in(root)) {
    std::ifstream file(root + "/node" + std::to_string(number) + "/cpulist");
    std::string line;
    if (!file || (!std::getline(file, line) && !file.eof())) return one;
    NumaNode node{number, {}};
    if (!parse_list(line, wanted, node.cpus)) return one;
    found += node.cpus.size();
    if (!node.cpus.empty()) nodes.push_back(std::move(node));
  }
  return found == wanted.size() && found > 0 ? nodes : one;
}

std::vector<ThreadPlace> place_threads(const std::vector<NumaNode>& nodes, int threads) {
  const auto count = static_cast<int>(nodes.size());
  size_t cpus = 0;
  for (const NumaNode& node : nodes) cpus += node.cpus.size();
  // How many threads each node has: one, and the others one by one to the node whose CPUs have the fewest.
  std::vector<size_t> share(nodes.size(), 1);
  for (int t = count; t < threads; ++t) {
    const auto less = [&](int a, int b) {
      return share[a] * nodes[b].cpus.size() < share[b] * nodes[a].cpus.size();
    };
    std::vector<int> order(nodes.size());
    std::iota(order.begin(), order.end(), 0);
    ++share[*std::ranges::min_element(order, less)];
  }
  const bool own = static_cast<size_t>(threads) == cpus && threads > 1;
  std::vector<ThreadPlace> places;
  for (int n = 0; n < count; ++n)
    for (size_t i = 0; i < share[n]; ++i) {
      ThreadPlace place{n, {}};
      if (own) {
        place.cpus = {nodes[n].cpus[i]};
      } else if (count > 1) {
        place.cpus = nodes[n].cpus;
      }
      places.push_back(std::move(place));
    }
  return places;
}

void prefer_node(void* data, size_t bytes, int number) {
  if (number < 0 || number >= kMostNumbers || bytes == 0) return;
  constexpr int kPreferred = 1;  // MPOL_PREFERRED of linux/mempolicy.h
  constexpr int kBits = std::numeric_limits<unsigned long>::digits;
  unsigned long mask[kMostNumbers / kBits] = {};
  mask[number / kBits] = 1UL << (number % kBits);
  syscall(SYS_mbind, data, bytes, kPreferred, mask, static_cast<unsigned long>(kMostNumbers + 1), 0UL);
}

}  // namespace kt
