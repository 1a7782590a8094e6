// What this processor and operating system let this process execute.
#pragma once

namespace kt {

struct Isa {
  bool avx2;         // with FMA, F16C and BMI2
  bool avx512;       // F, BW, DQ, VL and VNNI
  bool avx512_bf16;
};

// Asked once. A feature counts only if the operating system also saves its registers.
const Isa& isa();

}  // namespace kt
