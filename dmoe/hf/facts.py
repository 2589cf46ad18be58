"""What differs between the MoE blocks of transformers, by the class of their router.

A block is found by its structure (`moefy.py`), and routes with its own router. Beyond the choice
and the weights, dmoe needs the scores of all experts, for auxiliary losses, telemetry and
`capacity.priority=score`: the function of the logits named here. A router that is not listed is
refused, because its losses would be wrong in silence.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.errors import ConfigError

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logit_TE: logit_TE.softmax(-1),
    "sigmoid": lambda logit_TE: logit_TE.sigmoid(),
    "sqrtsoftplus": lambda logit_TE: F.softplus(logit_TE).sqrt(),
}

SOFTMAX_ROUTERS = frozenset(
    (
        "AriaTextTopKRouter",
        "DeepseekOcr2TextTopkRouter",
        "DeepseekV2TopkRouter",
        "DiffusionGemmaTextRouter",
        "Ernie4_5_MoeTopKRouter",
        "Ernie4_5_VLMoeMoeTopKRouter",
        "FlexOlmoTopKRouter",
        "Gemma4TextRouter",
        "GptOssTopKRouter",
        "GraniteMoeHybridTopKRouter",
        "GraniteMoeSWATopKRouter",
        "GraniteMoeSharedTopKRouter",
        "GraniteMoeTopKRouter",
        "HunYuanMoEV1Gate",
        "JambaTopKRouter",
        "LongcatFlashTopkRouter",
        "MellumTopKRouter",
        "MiniMaxTopKRouter",
        "Mistral4TopkRouter",
        "MistralLarge4TextTopkRouter",
        "MixtralTopKRouter",
        "OlmoeTopKRouter",
        "OpenAIPrivacyFilterTopKRouter",
        "PhimoeTopKRouter",
        "Qwen2MoeTopKRouter",
        "Qwen3MoeTopKRouter",
        "Qwen3NextTopKRouter",
        "Qwen3OmniMoeTalkerTextTopKRouter",
        "Qwen3OmniMoeThinkerTextTopKRouter",
        "Qwen3VLMoeTextTopKRouter",
        "Qwen3_5MoeTopKRouter",
        "Qwen4ExpTextTopKRouter",
        "UnlimitedOcrTextTopkRouter",
        "ZayaRouter",
    )
)
SIGMOID_ROUTERS = frozenset(
    (
        "AXK1TopkRouter",
        "AXK2TopkRouter",
        "AfmoeTokenChoiceRouter",
        "BailingHybridTopkRouter",
        "BeamTopKRouter",
        "DeepseekV32TopkRouter",
        "DeepseekV3TopkRouter",
        "Dots1TopkRouter",
        "Dots3NoteTextTopkRouter",
        "Dots3NoteVisionTopKRouter",
        "ExaoneMoeTopkRouter",
        "FlintTopKRouter",
        "Glm4MoeLiteTopkRouter",
        "Glm4MoeTopkRouter",
        "Glm4vMoeTextTopkRouter",
        "Glm5NextTextTopkRouter",
        "GlmMoeDsaTopkRouter",
        "HYV3TopKRouter",
        "HYV4TopkRouter",
        "InklingTopkRouter",
        "KimiLinearTopkRouter",
        "Kolibri1TopKRouter",
        "LagunaTopKRouter",
        "Llama4Router",
        "Lfm2MoeTopKRouter",
        "MiMoV2FlashTopkRouter",
        "MiniMaxM2TopKRouter",
        "MiniMaxM3VLTopKRouter",
        "MuseSparkTopkRouter",
        "NemotronHTopkRouter",
        "SolarOpenTopkRouter",
    )
)
SCORE_FIELDS = {
    "Cohere2MoeTopKRouter": "expert_selection_fn",
    "DeepseekV4TopKRouter": "scoring_func",
    "DeepseekV4HashRouter": "scoring_func",
    "Inkling2TopKRouter": "scoring_func",
}
"""Routers whose score function is a field of the model's config."""
LOGITS_OF = {"Gemma4TextRouter": "proj", "DiffusionGemmaTextRouter": "proj"}
"""The module inside the router that gives the logits, where its first output is none."""
BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""Of the bias that is added to the scores for the choice only."""


@dataclass(frozen=True)
class BlockFacts:
    """What dmoe must know of one block."""

    router: nn.Module
    score_name: str
    """Key of SCORES."""
    logits: nn.Module
    """The module whose (first) output is the logits of all experts."""

    def score(self, logit_TE: Tensor) -> Tensor:
        """Return the scores of all experts."""
        return SCORES[self.score_name](logit_TE)


def block_facts(block: nn.Module, name: str, config: object) -> BlockFacts:
    """Return what differs between blocks.

    Args:
        block: holds `experts` and its router.
        name: of the block in the model.
        config: of the model.

    Raises:
        ConfigError: a router that is unknown.
    """
    router = getattr(block, "gate", None)
    if not (isinstance(router, nn.Module) and _score_name(router, config)):
        router = getattr(block, "router", router)
    kind = type(router).__name__
    score = _score_name(router, config) if isinstance(router, nn.Module) else None
    if not isinstance(router, nn.Module) or score is None:
        known = "has no router that dmoe knows: its scores would be guessed"
        fix = "add the router's class to dmoe/hf/facts.py"
        raise ConfigError("model", f"{name} ({kind})", known, fix)
    logits = getattr(router, LOGITS_OF[kind]) if kind in LOGITS_OF else router
    return BlockFacts(router, score, logits)


def _score_name(router: nn.Module, config: object) -> str | None:
    kind = type(router).__name__
    if kind in SOFTMAX_ROUTERS:
        return "softmax"
    if kind in SIGMOID_ROUTERS:
        return "sigmoid"
    value = getattr(config, SCORE_FIELDS[kind], None) if kind in SCORE_FIELDS else None
    return value if value in SCORES else None


def bias_as_buffer(block: nn.Module, router: nn.Module, num_experts: int) -> None:
    """Make the bias of the choice a buffer, where it is a frozen parameter; its name stays.

    dmoe moves it like every other bias: on each rank in full, which FSDP2 would shard.
    """
    for owner in (router, *router.children(), block):
        for bias in BIAS_NAMES:
            value = owner._parameters.get(bias)
            if value is not None and value.numel() == num_experts:
                del owner._parameters[bias]
                owner.register_buffer(bias, value.detach())


def find_bias(block: nn.Module, router: nn.Module, num_experts: int) -> Tensor | None:
    """Return the bias of the choice, of E numbers; None if the block has none."""
    for owner in (router, *router.children(), block):
        for bias in BIAS_NAMES:
            value = getattr(owner, bias, None)
            if isinstance(value, Tensor) and value.numel() == num_experts:
                return value
    return None
