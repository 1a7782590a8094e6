"""Reading a config.json: each field typed and bounded, and none ignored that may change the mathematics."""

from collections.abc import Mapping
from typing import Final

from ktransformers.engine.models.fields import Fields, brief

_NAMES: Final = """
    architectures model_type transformers_version _name_or_path name_or_path language torch_dtype dtype
    task_specific_params finetuning_task license auto_map tokenizer_class unsloth_fixed unsloth_version
    _commit_hash _attn_implementation_autoset attn_implementation _attn_implementation
    _experts_implementation bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id eos_token image_token_index image_token_id boi_token_index eoi_token_index
    boi_token_id eoi_token_id vision_start_token_id vision_end_token_id video_token_id mm_tokens_per_image
    initializer_range initializer_factor attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop
    router_aux_loss_coef output_router_logits router_jitter_noise aux_loss_alpha seq_aux use_cache
    pretraining_tp gradient_checkpointing problem_type is_encoder_decoder is_decoder id2label label2id
    num_labels chunk_size_feed_forward output_hidden_states output_attentions return_dict
    return_dict_in_generate ep_size tie_encoder_decoder tf_legacy_loss torchscript use_bfloat16
    cross_attention_hidden_size add_cross_attention pruned_heads prefix begin_suppress_tokens
    suppress_tokens forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty bad_words_ids
    min_length max_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_return_sequences output_scores remove_invalid_values
    cache_implementation vision_config audio_config
"""
_DESCRIPTIVE: Final = frozenset(_NAMES.split())
"""Fields that do not change what is computed: names, special tokens (the tokenizer has its own files),
defaults of sampling, settings of training, other senses."""


class Config(Fields[object]):
    """The fields of one JSON object. null is as good as absent."""

    UNASKED = "is not known, so what it changes is not either"

    def __init__(self, values: Mapping[str, object], where: str = "config.json") -> None:
        present = {name: value for name, value in values.items() if value is not None}
        super().__init__(present, f"{where}: field '", _DESCRIPTIVE)
        self._null = values.keys() - present.keys()
        self._file = where
        self._sections: list[Config] = []

    def number_unless_null(self, name: str, low: float, high: float, default: float) -> float:
        """As `number`; 0 when the field is null, which says more than a field that is absent."""
        return 0.0 if name in self._null else self.number(name, low, high, default)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name)
        if value is None:
            value = default
        if not isinstance(value, str):
            raise self.error(name, "is missing" if value is None else f"{brief(value)} is not a string")
        return value

    def texts(self, name: str) -> list[str] | None:
        """An array of strings, or None."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.error(name, f"{brief(value)} is not an array of strings")
        return value

    def has(self, name: str) -> bool:
        return name in self._values

    def section(self, name: str) -> "Config | None":
        """An object within; `finish` asks it, too."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"{brief(value)} is not an object")
        section = Config(value, f"{self._file}: {name}")
        self._sections.append(section)
        return section

    def finish(self) -> None:
        """Refuse fields that nobody has asked for, in the sections, too."""
        super().finish()
        for section in self._sections:
            section.finish()
