"""An ensemble as a model of EleutherAI's lm-evaluation-harness, under the name `renyi`.

The harness sends requests as text. This file turns them into tokens, and turns answers into what the harness expects.
It needs the extra `renyi[lm-eval]`. Read next: `continuation.py` (likelihoods), `renyi.ensemble.decode` (decoding).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from renyi.data import load_tokenizer_of
from renyi.ensemble import LoraEnsemble
from renyi.ensemble.storage import read_ensemble, resolve_folder
from renyi.errors import ConfigError
from renyi.inference.continuation import ContinuationScore, score_continuations
from renyi.inference.generate import end_tokens
from renyi.inference.model import fastest

_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # tasks use any of these names


@register_model("renyi")
class RenyiLM(TemplateLM):
    """The mixture of an ensemble's members: log Σ_m π_m p_m(continuation | context), its greedy choices and its text.

    Args, as in `--model_args`:
        ensemble: folder of an ensemble, or a hub id.
        base: base model, if it is no longer where the ensemble says.
        member: one member alone instead of the mixture.
        mixture: for generated text, "sequence" or "token", as for `LoraEnsemble.generate`.
        batch_size: for generation; likelihoods are batched by `tokens_per_batch`.
        tokens_per_batch: limit on members × rows × length in one forward.
        device: by default cuda if there is one.
        max_length: longest context with its continuation; by default the model's.
        max_gen_toks: most tokens of generated text, if the task does not say.
        seed: for sampling, if a task asks for sampling.
        add_bos_token: whether texts begin with the tokenizer's special tokens; by default as the tokenizer does.

    Raises:
        ConfigError: an argument is out of range.
        EnsembleFormatError: the folder is not a readable ensemble.
    """

    def __init__(
        self,
        ensemble: str,
        base: str | None = None,
        member: int | None = None,
        mixture: str = "sequence",
        batch_size: int | str = 8,
        max_batch_size: int | None = None,  # the harness always passes it
        tokens_per_batch: int = 16_384,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int | None = 0,
        add_bos_token: bool | None = None,
    ):
        super().__init__()
        folder = resolve_folder(ensemble)
        self.ensemble = _loaded(folder, base, member)
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"  # the harness passes cuda:0 by default
        fastest(self.ensemble.to(device))
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer_of(folder, self.ensemble.base_model_name)
        self.mixture, self.seed, self.add_bos_token = mixture, seed, add_bos_token
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.tokens_per_batch, self.max_gen_toks = tokens_per_batch, max_gen_toks
        self.max_length = max_length or _context_length(self.ensemble.config)
        self._device = self.ensemble.device

    # ---- Likelihoods ---------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._scores([request[1:] for request in requests], disable_tqdm)
        answers = [(score.log_likelihood, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p̄ of whole texts. Each member reads a text longer than `max_length` in the harness's windows."""
        windows, texts = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                texts.append(number)
        log_w_M = self.ensemble.weights.double().cpu().log()
        ell_NM = log_w_M.new_zeros(len(requests), len(log_w_M))
        for number, score in zip(texts, self._scores(windows, disable_tqdm), strict=True):
            ell_NM[number] += torch.tensor(score.member_log_likelihood, dtype=torch.float64)
        answers: list[float] = (log_w_M + ell_NM).logsumexp(1).tolist()
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[ContinuationScore]:
        """Scores of pairs (context, continuation). Contexts are cut on the left to what the model can read."""
        contexts, continuations = [], []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation has {len(continuation)} tokens, and the longest allowed is {self.max_length}",
                    where="max_length",
                    hint="Leave the task out, or raise max_length if the model can read more.",
                )
            kept = self.max_length + 1 - len(continuation)  # the last token is predicted but not read
            contexts.append(context[-kept:])
            continuations.append(continuation)
        with tqdm(total=len(pairs), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            return score_continuations(
                self.ensemble,
                contexts,
                continuations,
                tokens_per_batch=self.tokens_per_batch,
                progress=lambda done: bar.update(done - bar.n),
            )

    # ---- Text ----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts, greedy unless the task asks for sampling, each ending before its first stop string."""
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        by_length = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), -len(prompts[i])))
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            while by_length:
                how = requests[by_length[0]].args[1]
                batch = [i for i in by_length[: self.batch_size] if requests[i].args[1] == how]
                by_length = by_length[len(batch) :]
                for i, text in zip(batch, self._continued([prompts[i] for i in batch], how), strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(batch))
        return [answers[i] for i in range(len(requests))]

    def _continued(self, prompts: list[list[int]], gen_kwargs: Mapping[str, Any]) -> list[str]:
        settings = dict(gen_kwargs)
        until = settings.pop("until", None) or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        limits = [settings.pop(name) for name in _MAX_TOKENS if settings.get(name) is not None]
        new = int(limits[0]) if limits else self.max_gen_toks
        temperature = float(settings.pop("temperature", None) or 0.0)
        if settings.setdefault("do_sample", temperature > 0) and temperature > 0:
            settings["temperature"] = temperature
        if new >= self.max_length:
            raise ConfigError(
                f"{new} new tokens leave no room for a prompt in {self.max_length}",
                where="max_gen_toks",
                hint="Ask for fewer: --gen_kwargs max_gen_toks=256.",
            )
        kept = [ids[-(self.max_length - new) :] for ids in prompts]
        longest = max(map(len, kept))
        ends = end_tokens(self.ensemble, self.tokenizer)
        pad = next((i for i in (self.tokenizer.pad_token_id, *ends) if i is not None), 0)
        if stops:
            settings["stopping_criteria"] = StoppingCriteriaList([_Stops(self.tokenizer, stops, longest)])
        if ends:
            settings["eos_token_id"] = ends
        generation = self.ensemble.generate(
            torch.tensor([[pad] * (longest - len(ids)) + ids for ids in kept]),
            torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in kept]),
            mixture=self.mixture,
            seed=self.seed,
            max_new_tokens=new,
            pad_token_id=pad,
            **settings,
        )
        texts = []
        for ids, mask in zip(generation.sequences[:, longest:].cpu(), generation.mask.cpu(), strict=True):
            text = str(self.tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True))
            texts.append(text[: min([len(text), *(text.find(stop) for stop in stops if stop in text)])])
        return texts

    # ---- What the harness asks of a tokenizer --------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context is conditioned on."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            begins = self.tokenizer.bos_token is not None and string.startswith(str(self.tokenizer.bos_token))
            add_special_tokens = False if begins else self.add_bos_token  # not if a chat template has written it
        flag = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **flag)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )


class _Stops(StoppingCriteria):
    """Ends an answer in which a stop string has just appeared. It works with every tokenizer.

    Only the last tokens are decoded. A character that is cut at their start does no harm: the text is cut later anyway.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int):
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        self.tail = max(len(stop.encode()) for stop in stops) + 2

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        newest = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(newest)
        stopped = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(stopped, device=input_ids.device)


def _loaded(folder: Path, base: str | None, member: int | None) -> LoraEnsemble:
    if member is None:
        return LoraEnsemble.load(folder, base=base)
    manifest = read_ensemble(folder, base)
    if member not in range(len(manifest.members)):
        raise ConfigError(
            f"there is no member {member}", where="member", hint=f"Members are 0 to {len(manifest.members) - 1}."
        )
    return LoraEnsemble.load([folder / manifest.members[member]], base=base or manifest.base_model)


def _context_length(config: Any) -> int:
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    return int(next((getattr(config, name) for name in names if getattr(config, name, None)), 2048))
