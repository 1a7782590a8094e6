// The table of this translation unit.
#pragma once

namespace kt {
namespace {

constexpr KernelTable make_table(const char* name) {
  KernelTable t{};
  t.name = name;
  t.packed_bytes = packed_bytes;
  t.pack = pack;
  t.unpack_row = unpack_row;
  t.requantize = requantize;
  t.activation = activation;
  t.activation_bytes = activation_bytes;
  t.activation_offset = activation_offset;
  t.quantize = quantize;
  t.gemm = gemm;
  t.far_out_bytes = far_out_bytes;
  t.index_far_out = index_far_out;
  t.add_far_out = add_far_out;
  t.rms_norm = rms_norm;
  t.rope = rope;
  t.silu_mul = silu_mul;
  t.gelu_tanh_mul = gelu_tanh_mul;
  t.relu_mul = relu_mul;
  t.swiglu_oai = swiglu_oai;
  t.add = add;
  t.softcap = softcap;
  t.weighted_sum = weighted_sum;
  t.store_kv = store_kv;
  t.store_half = store_half;
  t.attention_scratch_floats = attention_scratch_floats;
  t.attention = attention;
  t.attention_state_floats = attention_state_floats;
  t.attention_span = attention_span;
  t.attention_merge = attention_merge;
  t.short_conv = short_conv;
  t.delta_rule = delta_rule;
  t.scan_logits = scan_logits;
  t.exp_logits = exp_logits;
  t.peak = peak;
  t.read = read;
  return t;
}

}  // namespace
}  // namespace kt
