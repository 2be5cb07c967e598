"""The scheduler that keeps a group's rows together: `--scheduler-cls renyi.vllm.scheduler.WholeGroups`.

vLLM promises no lockstep, and says that its scheduler's interface may change. So this class trusts nothing: after each
step it compares the tokens of a group's rows, and ends the group with an error if a row is missing or differs. Its
requests then have the finish reason "error", and no token of that step leaves. `docs/serving.md` says which releases of
vLLM it was run with. What is decided is in `admission.py`.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from renyi.errors import ConfigError
from renyi.vllm.admission import Admission, Need, Room
from renyi.vllm.groups import Membership, membership_of

logger = logging.getLogger("vllm.renyi")
# What decides which token is chosen, and when an answer ends.
_SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "stop_token_ids",
    "ignore_eos",
)


class WholeGroups(Scheduler):
    """vLLM's scheduler, which begins groups whole and ends them whole."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        _check(config)
        blocks = self.kv_cache_config.num_blocks - 1 - self.kv_cache_manager.watermark_blocks  # those are vLLM's own
        adapters = config.lora_config.max_loras if config.lora_config else 0
        self._admission = Admission(Room(self.max_num_active_reqs, self.max_num_scheduled_tokens, blocks, adapters))
        self._held: dict[str, Request] = {}  # requests that vLLM's own queues do not hold yet
        self._ended: list[Request] = []  # requests to end with an error that nobody was told of yet
        logger.info("renyi: groups are admitted whole, %s", self._admission.room)

    # ---- Requests come and go ----------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        name = request.request_id
        if name in self.requests or request.resumable:  # an input that is streamed is vLLM's own affair
            super().add_request(request)
            return
        params = request.sampling_params
        membership = membership_of(params.extra_args) if params is not None else None
        self._held[name] = request
        like = None if membership is None else _like(request, membership)
        if reason := self._admission.add(name, request, membership, self._need(request), like):
            self._end([*self._admission.others(name), name], reason)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """End requests, and with each the others of its group."""
        if request_ids is None:
            names = [*self._held, *self.requests]
        else:
            names = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        asked = set(names)
        every = {other: None for name in names for other in (name, *self._admission.others(name))}
        self._end([name for name in every if name not in asked], "another request of the group was ended")
        held = [self._held.pop(name) for name in asked if name in self._held]
        for request in held:
            request.status = finished_status
            if self.finished_req_ids_dict is not None:
                self.finished_req_ids_dict[request.client_index].add(request.request_id)
        ended = super().finish_requests([name for name in asked if name in self.requests], finished_status)
        self._admission.forget(asked)
        return [*held, *ended]

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()
        return running, waiting + self._admission.num_waiting

    def get_num_unfinished_requests(self) -> int:
        return super().get_num_unfinished_requests() + len(self._ended)

    # ---- Steps -------------------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        # Rows that run read one token. Those that vLLM took and put off, as it may with a grammar, read their prompt.
        tokens = len(self.running) + sum(request.num_tokens for request in self.waiting)
        for group in self._admission.next(tokens, len(self.running) + len(self.waiting)):
            for member in range(group.size):
                request = group.requests[member]
                self._held.pop(request.request_id)
                super().add_request(request)
        return super().schedule(*args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        for group in self._admission.running:
            if group.size > 1 and (reason := self._flaw(group, scheduler_output, model_runner_output)):
                self._end(list(group.names), reason)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._admission.forget(
            output.request_id
            for each in outputs.values()
            for output in each.outputs
            if output.finish_reason is not None
        )
        return self._with_ended(outputs)

    def _flaw(self, group: Any, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> str | None:
        """Why the rows of a group did not go through this step together; None if they did, or if none of them ran."""
        names = [group.requests[member].request_id for member in range(group.size)]
        there = [name in scheduled.num_scheduled_tokens for name in names]
        if not any(there):
            return None
        if not all(there):
            return f"a step ran {sum(there)} of its {group.size} rows"
        tokens = [output.sampled_token_ids[output.req_id_to_index[name]] for name in names]
        if any(row != tokens[0] for row in tokens):
            return "its rows chose different tokens"
        return None

    def _end(self, names: Sequence[str], reason: str) -> None:
        """End requests with an error, at once; their clients are told after the next step."""
        for name in dict.fromkeys(names):
            request = self._held.pop(name, None)
            if request is None:
                found = super().finish_requests([name], RequestStatus.FINISHED_ERROR)
                request = found[0] if found else None
            if request is not None:
                logger.error("renyi: %s: the group was ended: %s", name, reason)
                request.status = RequestStatus.FINISHED_ERROR
                self._ended.append(request)
        self._admission.forget(names)

    def _with_ended(self, outputs: dict[int, EngineCoreOutputs]) -> dict[int, EngineCoreOutputs]:
        for request in self._ended:
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(output)
        self._ended.clear()
        return outputs

    def _need(self, request: Request) -> Need:
        most = request.num_prompt_tokens + request.max_tokens
        longest = min(most, self.max_model_len)
        blocks = sum(-(-longest // group.kv_cache_spec.block_size) for group in self.kv_cache_config.kv_cache_groups)
        adapter = request.lora_request.lora_int_id if request.lora_request is not None else None
        return Need(request.num_prompt_tokens, blocks, adapter)


def _like(request: Request, membership: Membership) -> Any:
    """What has to be equal for the requests of a group."""
    params = request.sampling_params
    settings = tuple(getattr(params, name) for name in _SETTINGS)
    own = (membership.weights, membership.mixture, membership.alternatives, membership.members)
    return list(request.prompt_token_ids or []), settings, own


def _check(config: Any) -> None:
    """Raise `ConfigError` where groups cannot be kept whole."""
    for is_wrong, what, option in (
        (config.scheduler_config.async_scheduling, "asynchronous scheduling", "--no-async-scheduling"),
        (config.scheduler_config.enable_chunked_prefill, "chunked prefill", "--no-enable-chunked-prefill"),
        (config.speculative_config is not None, "speculative decoding", "no --speculative-config"),
        (config.kv_transfer_config is not None, "a KV connector", "no --kv-transfer-config"),
        (config.scheduler_config.policy != "fcfs", "another policy than fcfs", "--scheduling-policy fcfs"),
    ):
        if is_wrong:
            raise ConfigError(f"a group of rows is not kept together with {what}", hint=f"Start vLLM with {option}.")
