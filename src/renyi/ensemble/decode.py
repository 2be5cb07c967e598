"""Generates tokens from a mixture of members: the decoding loop over member-major rows with one KV cache.

One forward of the base per step serves all members. transformers prepares everything that does not depend on members:
processors, warpers, stopping criteria and the cache. Input and output are token ids.

Read next: `inference/generate.py`, which generates text from prompts.
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from renyi.ensemble.choosing import TokenChoice, step
from renyi.ensemble.member_rows import repeat_rows
from renyi.errors import ConfigError
from renyi.measures import TokenUncertainty
from renyi.objectives import effective_members, running_log_weights

MIXTURES = ("sequence", "token", "member")

OnToken = Callable[[Tensor, TokenUncertainty], object]

# Settings of transformers' `generate` that need more than one distribution per step, or a second model.
_REFUSED = (
    "num_beams",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
    "guidance_scale",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
)
# On a CPU a prompt is read in chunks of about this many tokens, summed over rows. Smaller chunks multiply fewer rows at
# once, and each copies the cache. Larger ones were no faster by more than times vary, and take more memory.
_CPU_ROWS = 2048
_CACHES = (None, "dynamic", "offloaded", "quantized", "static")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# Lowest and highest value, whether the lowest value itself is excluded, and the hint for other values.
_RANGES: dict[str, tuple[float, float, bool, str]] = {
    "temperature": (0, 1e9, False, "a number from 0, which takes the likeliest token"),
    "top_k": (0, 1e9, False, "an integer from 0, which keeps all tokens"),
    "top_p": (0, 1, True, "a number above 0 and at most 1"),
    "min_p": (0, 1, False, "a number from 0 to 1"),
    "repetition_penalty": (0, 1e9, True, "a number above 0; 1 changes nothing"),
    "max_new_tokens": (1, 1e9, False, "an integer above 0"),
}
_LISTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")


class Generation(NamedTuple):
    """B answers of at most N new tokens, and the ensemble's uncertainty about them.

    An answer comes from a mixture of K members. K is M, or 1 with mixture="member"; then the other shapes have M before
    B, unless one member was chosen. Uncertainties are those of the mixture before temperature and other warpers, in
    nats, as in `token_uncertainty`. After the end of an answer every quantity of a token is 0.

    Attributes:
        sequences: [B, T + N], the prompts, padded on the left, and the answers, padded on the right.
        mask: [B, N] bool, True where a token was generated, including the end-of-text token.
        log_prob: [B, N] float64, log-probability of each token under the mixture, nats.
        weights: [K, B, N] float64, running weights of the members with which each token was predicted.
        total: [B, N] float64, total uncertainty of each token.
        aleatoric: [B, N] float64, aleatoric uncertainty of each token.
        epistemic: [B, N] float64, epistemic uncertainty of each token.
        member_log_likelihood: [K, B] float64, log p_m(answer | prompt) in nats.
        mixture_nll: [B] float64, −log of the answer's probability under the mixture that generated it, nats.
        mean_epistemic: [B] float64, mean over the answer's tokens.
        max_epistemic: [B] float64, maximum over the answer's tokens.
        disagreement: [B] float64, the mean variation ratio: the weight of the members whose most likely token is not
            the majority's, from 0 to 1 − 1/K.
        effective_members: [B] float64, exp of the entropy of the posterior over members given the answer, 1 to K.
        within_members: [B, N] float64, the part of the epistemic uncertainty within members that are distributions; 0
            unless the K members are draws.
        between_members: [B, N] float64, the part between members.
    """

    sequences: Tensor
    mask: Tensor
    log_prob: Tensor
    weights: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    member_log_likelihood: Tensor
    mixture_nll: Tensor
    mean_epistemic: Tensor
    max_epistemic: Tensor
    disagreement: Tensor
    effective_members: Tensor
    within_members: Tensor
    between_members: Tensor

    @property
    def new_tokens(self) -> Tensor:
        """The generated tokens [B, N]: `sequences` without the prompts."""
        return self.sequences[..., self.sequences.shape[-1] - self.mask.shape[-1] :]


@torch.no_grad()
def decode(
    base: PreTrainedModel,
    weights: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mixture: str = "sequence",
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    on_token: OnToken | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    num_draws: int = 1,
    **settings: Any,
) -> Generation:
    """Continue B prompts under the mixture of the members that `base`'s rows belong to.

    Args:
        base: in evaluation mode, with M members in its joint layers.
        weights: mixture weights of these members, [M], summing to one.
        num_draws: how many members, one after another, are draws of one.

    Other arguments and errors are those of `LoraEnsemble.generate`.
    """
    if mixture not in MIXTURES:
        raise ConfigError(f"{mixture!r} is none of {', '.join(MIXTURES)}", where="mixture")
    _check_settings(base, generation_config, settings)
    settings = _settled(settings, generation_config)
    input_ids, attention_mask = _left_padded(input_ids.to(base.device), attention_mask)
    log_weights = weights.to(base.device).double().log().log_softmax(0)
    by_member = mixture == "member"
    if by_member:  # each member has rows of its own, which are a mixture of one member
        input_ids, attention_mask = (x.repeat(len(weights), 1) for x in (input_ids, attention_mask))
        log_weights, num_draws = log_weights.new_zeros(1), 1
    if streamer is not None and len(input_ids) > 1:
        raise ConfigError(
            f"takes one answer, not {len(input_ids)}", where="streamer", hint="Give one prompt and no streamer to more."
        )
    prepared = _prepare(base, input_ids, attention_mask, generation_config, tokenizer, settings)
    by_token, generator = mixture == "token", _generator(seed, base)
    steps = _loop(base, log_weights, prepared, by_token, generator, streamer, on_token, num_draws)
    generation = _summarise(steps, log_weights)
    return _by_member(generation, len(weights)) if by_member else generation


def token_choice(base: PreTrainedModel, input_ids: Tensor, seed: int | None = None, **settings: Any) -> TokenChoice:
    """How `decode` chooses the tokens that continue prompts [B, T], for callers that run the steps themselves.

    Arguments and errors are those of `decode`. Settings that end an answer (max_new_tokens, stop_strings, …) have no
    effect here.
    """
    _check_settings(base, None, settings)
    prepared = _prepare(base, input_ids, torch.ones_like(input_ids), None, None, _settled(settings, None))
    return TokenChoice(prepared.processors, prepared.config.do_sample, _generator(seed, base))


# ---- The loop --------------------------------------------------------------------------------------------------------


class _Prepared(NamedTuple):
    """The arguments that transformers' `generate` passes to a decoding loop."""

    input_ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    model_kwargs: dict[str, Any]


class _Steps(NamedTuple):
    """The results of the loop: the final ids, and for every step values of rows [B] or of members and rows [K, B]."""

    sequences: Tensor
    mask: list[Tensor]
    log_probs: list[Tensor]
    log_weights: list[Tensor]
    uncertainty: list[TokenUncertainty]
    within_members: list[Tensor]  # empty unless members are draws


def _loop(
    base: PreTrainedModel,
    log_weights: Tensor,
    prepared: _Prepared,
    by_token: bool,
    generator: torch.Generator | None,
    streamer: BaseStreamer | None,
    on_token: OnToken | None,
    num_draws: int,
) -> _Steps:
    """The decoding loop of transformers, but with the members' distributions mixed before a token is chosen."""
    ids_BT, processors, criteria, config, _ = prepared
    num_members, batch = len(log_weights), len(ids_BT)
    forward = _Forward(base, prepared, num_members)
    pad = config._pad_token_tensor if config._pad_token_tensor is not None else ids_BT.new_zeros(())
    log_w_KB = log_weights[:, None].expand(num_members, batch)
    unfinished_B = torch.ones_like(ids_BT[:, 0], dtype=torch.bool)
    steps = _Steps(ids_BT, [], [], [], [], [])
    if streamer is not None:
        streamer.put(ids_BT.cpu())
    choice = TokenChoice(processors, config.do_sample, generator)
    while True:
        logits_KBV = forward(ids_BT).view(num_members, batch, -1)
        now = step(logits_KBV, log_w_KB, ids_BT, choice, by_token, unfinished_B, pad, num_draws)
        steps.mask.append(unfinished_B)
        steps.log_probs.append(now.log_probs)
        steps.log_weights.append(log_w_KB)
        steps.uncertainty.append(now.uncertainty)
        if now.parts is not None:
            steps.within_members.append(now.parts.within_members)
        log_w_KB = now.log_weights

        ids_BT = torch.cat([ids_BT, now.tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(now.tokens.cpu())
        if on_token is not None:
            on_token(now.tokens, now.uncertainty)
        unfinished_B = unfinished_B & ~criteria(ids_BT, None)
        if not unfinished_B.any():
            break
    if streamer is not None:
        streamer.end()
    return steps._replace(sequences=ids_BT)


class _Forward:
    """Next-token logits [K·B, V] of member-major rows by the model's own forward, which reads new tokens only.

    It uses private methods of transformers that serve decoding loops. They depend on the model: how a prompt is read in
    chunks, how mask and positions grow, and whether a step can be compiled (CUDA graphs, if the cache is static).
    """

    def __init__(self, base: Any, prepared: _Prepared, num_members: int):
        self.base, self.config, self.num_members = base, prepared.config, num_members
        batch = len(prepared.input_ids)
        self.kwargs = {k: repeat_rows(v, num_members, batch) for k, v in prepared.model_kwargs.items()}
        if "logits_to_keep" in self.kwargs:
            # Select the last position by an index and not by a slice. A slice is not contiguous; a CPU then multiplies
            # row by row and copies the whole head for each row.
            self.kwargs["logits_to_keep"] = torch.tensor([-1], device=base.device)
        if self.config.prefill_chunk_size is None and base.device.type == "cpu" and self._can_chunk():
            self.config.prefill_chunk_size = max(1, _CPU_ROWS // (num_members * batch))
        can_compile = base._valid_auto_compile_criteria(self.kwargs, self.config)
        self.step = base.get_compiled_call(self.config.compile_config) if can_compile else base
        self.is_first = True

    def __call__(self, ids_BT: Tensor) -> Tensor:
        rows = ids_BT.repeat(self.num_members, 1)
        if self.is_first:
            output = self.base._prefill(rows, self.config, self.kwargs)
        else:
            new = 1 if self.kwargs.get("use_cache") else None
            inputs = self.base.prepare_inputs_for_generation(rows, next_sequence_length=new, **self.kwargs)
            output = self.step(**inputs, return_dict=True)
        self.kwargs = self.base._update_model_kwargs_for_generation(output, self.kwargs)
        self.is_first = False
        return output.logits[:, -1]

    def _can_chunk(self) -> bool:
        """Whether the cache holds keys and values of attention only."""
        cache = self.kwargs.get("cache", self.kwargs.get("past_key_values"))  # its name until transformers 5.24
        return isinstance(cache, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def _summarise(steps: _Steps, log_weights: Tensor) -> Generation:
    mask_BN = torch.stack(steps.mask, -1)
    log_p_KBN, log_w_KBN = torch.stack(steps.log_probs, -1), torch.stack(steps.log_weights, -1)
    uncertainty = TokenUncertainty(
        *(torch.stack(values, -1).masked_fill(~mask_BN, 0.0) for values in zip(*steps.uncertainty, strict=True))
    )
    within = torch.zeros_like(uncertainty.epistemic)
    if steps.within_members:
        within = torch.stack(steps.within_members, -1).masked_fill(~mask_BN, 0.0)
    tokens_B = mask_BN.sum(-1)
    log_prob_BN = (log_w_KBN + log_p_KBN).logsumexp(0).masked_fill(~mask_BN, 0.0)
    ell_KB = log_p_KBN.masked_fill(~mask_BN, 0.0).sum(-1)
    return Generation(
        sequences=steps.sequences,
        mask=mask_BN,
        log_prob=log_prob_BN,
        weights=log_w_KBN.exp().masked_fill(~mask_BN, 0.0),
        total=uncertainty.total,
        aleatoric=uncertainty.aleatoric,
        epistemic=uncertainty.epistemic,
        member_log_likelihood=ell_KB,
        mixture_nll=-log_prob_BN.sum(-1),
        mean_epistemic=uncertainty.epistemic.sum(-1) / tokens_B,
        max_epistemic=uncertainty.epistemic.amax(-1),
        disagreement=uncertainty.variation_ratio.sum(-1) / tokens_B,
        effective_members=effective_members(running_log_weights(log_weights[:, None].expand_as(ell_KB), ell_KB).exp()),
        within_members=within,
        between_members=uncertainty.epistemic - within,
    )


def _by_member(generation: Generation, num_members: int) -> Generation:
    """Reshape rows [M·B] to [M, B]."""
    mixed = ("weights", "member_log_likelihood")  # their rows are the second dimension

    def split(name: str, value: Tensor) -> Tensor:
        return value.unflatten(1 if name in mixed else 0, (num_members, -1))

    return Generation(**{name: split(name, value) for name, value in generation._asdict().items()})


def _generator(seed: int | None, base: PreTrainedModel) -> torch.Generator | None:
    """The generator for sampling; None, for torch's global generator, without a seed."""
    return None if seed is None else torch.Generator(base.device).manual_seed(seed)


# ---- Inputs and settings ---------------------------------------------------------------------------------------------


def _prepare(
    base: Any,  # mypy takes `generate` for a tensor
    input_ids: Tensor,
    attention_mask: Tensor,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: dict[str, Any],
) -> _Prepared:
    """Let transformers' `generate` prepare everything, and take over where its own loop would begin."""

    def hand_over(model: Any, input_ids: Tensor, **given: Any) -> _Prepared:
        processors, criteria = given.pop("logits_processor"), given.pop("stopping_criteria")
        return _Prepared(input_ids, processors, criteria, given.pop("generation_config"), given)

    criteria = StoppingCriteriaList(settings.get("stopping_criteria") or [])
    stop_strings = _setting("stop_strings", base, generation_config, settings)
    if stop_strings:
        if tokenizer is None:
            raise ConfigError("cannot be found without a tokenizer", where="stop_strings", hint="Give `tokenizer`.")
        # Added here, because `generate` does not pass the tokenizer on to a custom loop.
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    given = {"cache_implementation": "dynamic", **settings, "stopping_criteria": criteria, "stop_strings": None}
    try:
        return base.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            custom_generate=hand_over,
            **given,
        )
    except ValueError as error:
        raise ConfigError(f"transformers refuses these settings ({error})", where="generate") from error


def _setting(name: str, base: PreTrainedModel, config: GenerationConfig | None, settings: dict[str, Any]) -> Any:
    """The value of a setting that applies: given by name, else by a config, else the model's own."""
    if name in settings:
        return settings[name]
    given = getattr(config, name, None)
    return getattr(base.generation_config, name, None) if given is None else given


def _check_settings(base: PreTrainedModel, config: GenerationConfig | None, settings: dict[str, Any]) -> None:
    known = [*vars(GenerationConfig()), *_LISTS]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                "there is no such setting of generation",
                where=name,
                hint=f"Did you mean {near[0]}?" if near else "They are those of transformers' GenerationConfig.",
            )
    for name in _REFUSED:
        value = _setting(name, base, config, settings)
        if value is True or value not in (None, 0, 1):
            raise ConfigError(
                f"is {value!r}, which is not possible for a mixture", where=name, hint="Sample, or decode greedily."
            )
    if _setting("num_return_sequences", base, config, settings) not in (None, 1):
        raise ConfigError(
            "a prompt gets one answer only", where="num_return_sequences", hint="Repeat the prompt, and sample."
        )
    for name, (low, high, is_open, expected) in _RANGES.items():
        value = settings.get(name)
        if value is None:
            continue
        fits = isinstance(value, int | float) and low <= value <= high and not (is_open and value == low)
        if not fits:
            raise ConfigError(f"is {value!r}", where=name, hint=f"Give {expected}.")
    cache = settings.get("cache_implementation", getattr(config, "cache_implementation", None))
    if cache not in _CACHES:
        raise ConfigError(f"is {cache!r}", where="cache_implementation", hint='Leave it out, or write "static".')


def _settled(settings: dict[str, Any], config: GenerationConfig | None) -> dict[str, Any]:
    """The settings with `do_sample` filled in: a temperature, top_k, top_p or min_p turns sampling on.

    Raises:
        ConfigError: `do_sample` is False, but a temperature is given.
    """
    given = {name: settings.get(name, getattr(config, name, None)) for name in _SAMPLING}
    do_sample = settings.get("do_sample", getattr(config, "do_sample", None))
    if given["temperature"] == 0:  # the most likely token, whatever else is given
        return {**{k: v for k, v in settings.items() if k not in _SAMPLING}, "temperature": None, "do_sample": False}
    if do_sample is False and given["temperature"] not in (None, 1):
        raise ConfigError(
            f"is False, but a temperature of {given['temperature']:g} needs sampling",
            where="do_sample",
            hint="Leave one of the two out.",
        )
    if do_sample is None and any(value is not None for value in given.values()):
        return {**settings, "do_sample": True}
    return settings


def _left_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same tokens with all padding moved to the left, as a decoder needs it."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    attention_mask = attention_mask.to(input_ids)
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ConfigError(
            f"have shapes {list(input_ids.shape)} and {list(attention_mask.shape)}",
            where="input_ids and attention_mask",
            hint="Both are [B, T].",
        )
    empty = ~attention_mask.any(-1)
    if input_ids.numel() == 0 or empty.any():
        which = f"prompt {int(empty.nonzero()[0]) + 1}" if empty.any() else "prompts"
        raise ConfigError("no token to continue", where=which, hint="Give at least the beginning-of-text token.")
    order = (attention_mask != 0).long().argsort(dim=-1, stable=True)
    return input_ids.gather(-1, order), attention_mask.gather(-1, order)
