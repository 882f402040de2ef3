"""Stock modules that read the weight of a child layer instead of calling the layer. Such a layer cannot be binary.

The table is keyed by the class that reads. `hf_bnn.bypassed_layers` finds layers that the table does not list.
"""

from torch import nn

_MAMBA = ("x_proj", "dt_proj", "out_proj")  # in training one fused operation reads all of them
_KEY_MAP = ("k_proj",)  # a 1 x 1 convolution by hand

DIRECT_READS = {
    "BambaMixer": ("out_proj",),
    "ConditionalDetrMHAttentionMap": _KEY_MAP,
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": _KEY_MAP,
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": _MAMBA,
    "Gemma3nTextAltUp": ("correction_coefs",),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "LSHSelfAttention": ("query_key", "value"),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LongcatFlashTopkRouter": ("classifier",),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": _MAMBA,
    "MaskFormerDetrMHAttentionMap": _KEY_MAP,
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NemotronHMamba2Mixer": ("out_proj",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "RwkvFeedForward": ("value",),  # the model divides its weight by powers of two, in place
    "RwkvSelfAttention": ("output",),
    "TDNNLayer": ("kernel",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "Zamba2MambaMixer": ("out_proj",),
}


def reads_weight(parent: nn.Module, child: str) -> bool:
    """Whether `parent` reads the weight of its layer called `child`, at least in training."""
    if isinstance(parent, nn.MultiheadAttention):
        return child == "out_proj"
    return any(child in DIRECT_READS.get(cls.__name__, ()) for cls in type(parent).__mro__)
