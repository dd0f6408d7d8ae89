"""Which of PEFT's tests must be refused, which do not apply, and which are met half-way; each with its reason.

Rows of a parametrised test that are for another method, or for an option that LoRA alone has, are told apart by their
values (`smear_suite.why_not`). Here are tests that name what they need inside.
"""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """Tests that pass when what they ask for is refused.

    Attributes:
        reason: why it is refused.
        words: regular expression for the error, its type included.
        tests: regular expression for the tests' ids.
    """

    reason: str
    words: str
    tests: str


OTHER_WORDS = "AssertionError: Regex pattern did not match.*Actual message: .*"

REFUSED = (
    Refusal(
        "nn.MultiheadAttention has no width that tells its output: a ValueError names it",
        r"ValueError: The width of mha \(MultiheadAttention\) cannot be told|" + OTHER_WORDS + r"The width of mha",
        r"MHA|_mha_|multihead_attention",
    ),
    Refusal(
        "PEFT's own refusal: PeftMixedModel is closed to methods from outside",
        r"ValueError: The provided `peft_type` 'SMEAR' is not compatible with the `PeftMixedModel`"
        r"|ValueError: Adapter of type PeftType\.SMEAR is not supported for mixed models",
        r"test_mixed\.py|test_mixed_model_from_pretrained|\[PeftMixedModel\]|without_mutation\[True\]$",
    ),
    Refusal(
        "experts that depend on the input cannot be merged: a ValueError says so; what precedes the merge works",
        "ValueError: A SMEAR adapter cannot be merged into the base weights",
        r"test_(safe_|sequential_)?merge_|test_(safe|sequential)_merge|test_unmerge_after|_merge_and_unmerge|_with_merging\["
        r"|test_delete_merged|batches_merged_raises|test_unload_with_inactive\S*\[merge|_merged_and_unmerged_same"
        r"|test_forward_b?float16|adapter_merged$",
    ),
    Refusal(
        "adapters with a router each cannot be added up: a ValueError says so",
        "ValueError: SMEAR adapters cannot be added up|" + OTHER_WORDS + "SMEAR adapters cannot be added up",
        r"weighted|merging_adapters|test_multiple_active_adapters_forward",
    ),
    Refusal(
        "PEFT's own refusal: hot-swapping is for LoRA alone",
        "ValueError: (Hotswapping only supports LORA|No adapter layers found on the model, make sure call `prepare)",
        r"TestHotSwapping::test_(hotswap_works|hotswap_extra_key|prepare_model)(?!\S*(groups_rank_not|already_compiled_(raises|wr)))",
    ),
    Refusal(
        "pickled weights are never read: a ValueError names the file and how to save it again",
        r"ValueError: \S+ has no adapter_model\.safetensors, only adapter_model\.bin: pickled files can run code",
        r"::test_save_pretrained_(selected_adapters_)?pickle",
    ),
    Refusal(
        "an adapter cannot be called like a module: PEFT would lose tensors of the other adapters on saving",
        "ValueError: An adapter cannot be called",
        r"same_as_module_name",
    ),
    Refusal(
        "refused in other words: the ValueError lists the modules that were found, and what narrowed the choice",
        OTHER_WORDS + r"target_modules=.* \(with modules_to_save=.*matches no module",
        r"test_targeting_module_to_save_raises|test_modules_to_save_targets_tuner_layer_raises",
    ),
)

NOT_APPLICABLE = {
    "asserts on LoRA's own tensors, scales, printed form or layer classes": (
        r"test_requires_grad_(lora|modules_to_save|follows_inference_mode_modules)|test_repr_lora|TestDynamicDispatch"
        r"|TestScaling|test_lora_(linear|embedding|conv2d)_(init_)?(default|false)|test_lora_scaling|test_lora_with_bias_arg"
        r"|test_loading_adapter_preserves_custom_requires_grad|targets_lora_layer_raises|test_nested_config_survives"
        r"|rank_not_divisible|TestLowLevelFunctional::test_(inject_adapter_in_model$|get_peft|modules_to_save)"
        r"|test_get_peft_model_\S*low_cpu_mem_usage_works|missing_keys_warning|_with_weight_conversion$|prefix_removal"
        r"|unsharded_state_dict|test_hotswap_(missing_key|different_peft)"
    ),
    "the option ensure_weight_tying, which LoRA alone has": r"TestWeightTying::test_alt_weight_tying_tied_model_",
    "LoRA's table of default targets; ours is smear_peft/architectures.py": (
        "TestDefaultTargetModules::test_default_target_modules_(list_of_)?str"
    ),
    "the configuration stays the user's: the model keeps and saves a copy with the sites filled in": (
        r"test_from_pretrained_config_construction|test_no_infinite_recursion\[PeftModelFor(TokenClass|QuestionAns)"
    ),
    "target_modules stays a list, in the order of the file; PEFT's methods make a set of it": "with_target_modules",
    "a block on an embedding's output does not depend on the size of the vocabulary: nothing can mismatch": (
        "test_load_resized_embedding"
    ),
    "a router that sees a single channel has nothing to learn": (
        r"only_params_are_updated\[(Embedding \+ transformers Conv1D [13]|Conv1d LoRA)"
    ),
    "needs the Hub": r"_from_pretrained_cache_dir",
    "needs diffusers": "stable_diffusion",
}

# LoRA starts as the identity and these tests rely on it; here the experts' second matrix starts at zero for them.
STARTS_AS_IDENTITY = r"::test_disable_adapters\["
# Three steps of SGD must move each parameter by 1e-4; PEFT gives its own methods, by name, a rate of 100 for it.
WIDE_STEPS = r"::test_only_params_are_updated\["
