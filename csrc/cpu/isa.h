// What this processor and operating system let this process execute.
#pragma once

namespace kt {

struct Isa {
  bool avx2;         // with FMA, F16C and BMI2
  bool avxvnni;      // AVX-VNNI, beside all of the above
  bool avx512;       // F, BW, DQ, VL and VNNI
  bool avx512_bf16;
  bool amx;          // tiles of int8 and bfloat16, beside all of the above but AVX-VNNI
};

// Asked once. A feature counts only if the operating system also saves its registers; for those of AMX a process has to
// ask, which this does.
const Isa& isa();

// Whether the first-level data cache has 48 KiB or more (Zen 5; Intel since Ice Lake), not 32 (Zen 4 and before).
extern const bool kRoomyFirstLevel;

}  // namespace kt
