"""What vLLM calls, the scheduler and the processor, with stand-ins for the vLLM classes that they derive from and use.

`test_real_vllm.py` runs them in vLLM. Here a step can go wrong in the ways that they have to notice.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from renyi.errors import ConfigError
from renyi.vllm import SCHEDULER
from renyi.vllm.groups import Membership

WEIGHTS = (0.5, 0.3, 0.2)


class StubScheduler:
    """vLLM's scheduler as far as ours relies on it: queues, and a step that runs what `cut` leaves."""

    def __init__(self, vllm_config, kv_cache_config):
        self.vllm_config, self.kv_cache_config = vllm_config, kv_cache_config
        self.kv_cache_manager = SimpleNamespace(watermark_blocks=2)
        self.max_num_active_reqs, self.max_num_scheduled_tokens, self.max_model_len = 8, 100, 64
        self.requests, self.waiting, self.running = {}, [], []
        self.finished_req_ids_dict = None
        self.cut = set()

    def add_request(self, request):
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def finish_requests(self, names, status):
        found = [self.requests.pop(name) for name in names if name in self.requests]
        for request in found:
            request.status = status
        self.running = [each for each in self.running if each not in found]
        self.waiting = [each for each in self.waiting if each not in found]
        return found

    def get_request_counts(self):
        return len(self.running), len(self.waiting)

    def get_num_unfinished_requests(self):
        return sum(self.get_request_counts())

    def schedule(self):
        self.running, self.waiting = self.running + self.waiting, []
        there = [each.request_id for each in self.running if each.request_id not in self.cut]
        return SimpleNamespace(num_scheduled_tokens=dict.fromkeys(there, 1))

    def update_from_output(self, scheduled, output):
        told = []
        for name in scheduled.num_scheduled_tokens:
            if name in self.requests:
                tokens = output.sampled_token_ids[output.req_id_to_index[name]]
                is_end = tokens == [0]
                told.append(Output(name, tokens, "stop" if is_end else None))
                if is_end:
                    StubScheduler.finish_requests(self, [name], "stopped")
        return {0: SimpleNamespace(outputs=told)} if told else {}


class Output(SimpleNamespace):
    def __init__(self, request_id, new_token_ids, finish_reason, **more):
        super().__init__(request_id=request_id, new_token_ids=new_token_ids, finish_reason=finish_reason)


def request(name, member=0, group=None, prompt=(1, 2), **settings):
    """A request as vLLM's scheduler gets it; of a group if one is named."""
    extra = Membership(group, member, WEIGHTS).extra_args() if group else None
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {**dict.fromkeys((*names, "stop_token_ids", "ignore_eos"), 0), "seed": 1, "max_tokens": 4, **settings}
    made = SimpleNamespace(
        request_id=name,
        resumable=False,
        sampling_params=SimpleNamespace(extra_args=extra, **given),
        prompt_token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        num_tokens=len(prompt),
        max_tokens=given["max_tokens"],
        lora_request=SimpleNamespace(lora_int_id=member + 1),
        client_index=0,
        trace_headers=None,
        status="waiting",
    )
    made.get_finished_reason = lambda: made.status
    made.take_events = list
    return made


@pytest.fixture
def plugin(monkeypatch):
    """Our modules `scheduler` and `processor`, imported among stand-ins for vLLM's."""
    kinds = {
        "vllm": {"SamplingParams": object},
        "vllm.distributed.parallel_state": {
            "get_pp_group": lambda: SimpleNamespace(is_last_rank=True),
            "get_tp_group": lambda: SimpleNamespace(rank_in_group=1),  # this worker tells nobody
        },
        "vllm.v1.core.sched.output": {"SchedulerOutput": object},
        "vllm.v1.core.sched.scheduler": {"Scheduler": StubScheduler},
        "vllm.v1.engine": {"EngineCoreOutput": Output, "EngineCoreOutputs": SimpleNamespace},
        "vllm.v1.outputs": {"ModelRunnerOutput": object},
        "vllm.v1.request": {"Request": object, "RequestStatus": SimpleNamespace(FINISHED_ERROR="error")},
        "vllm.v1.sample.logits_processor": {
            "BatchUpdate": object,
            "LogitsProcessor": object,
            "MoveDirectionality": SimpleNamespace(SWAP="swap", UNIDIRECTIONAL="one way"),
        },
    }
    for name, names in kinds.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("renyi.vllm.scheduler", "renyi.vllm.processor"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = SimpleNamespace(
        scheduler=importlib.import_module("renyi.vllm.scheduler"),
        processor=importlib.import_module("renyi.vllm.processor"),
    )
    yield found
    for name in ("renyi.vllm.scheduler", "renyi.vllm.processor"):
        sys.modules.pop(name, None)


def config(**scheduler):
    own = {"async_scheduling": False, "enable_chunked_prefill": False, "policy": "fcfs", "scheduler_cls": SCHEDULER}
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(**{**own, **scheduler}),
        lora_config=SimpleNamespace(max_loras=3),
        speculative_config=None,
        kv_transfer_config=None,
        model_config=SimpleNamespace(logprobs_mode="raw_logprobs"),
        additional_config={},
    )


def made(plugin, blocks=20, **scheduler):
    spec = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=4))
    return plugin.scheduler.WholeGroups(
        config(**scheduler), SimpleNamespace(num_blocks=blocks + 3, kv_cache_groups=[spec])
    )


def step(scheduler, tokens=None):
    """One step of vLLM, in which rows choose token 5, or those given; what clients are told, by request."""
    scheduled = scheduler.schedule()
    names = list(scheduled.num_scheduled_tokens)
    sampled = [[(tokens or {}).get(name, 5)] for name in names]
    output = SimpleNamespace(sampled_token_ids=sampled, req_id_to_index={name: i for i, name in enumerate(names)})
    told = scheduler.update_from_output(scheduled, output)
    return {each.request_id: (each.new_token_ids, each.finish_reason) for per in told.values() for each in per.outputs}


def begun(scheduler, group="g"):
    for member in range(3):
        scheduler.add_request(request(f"{group}{member}", member, group))
    return step(scheduler)


ALL = {f"g{member}": ([5], None) for member in range(3)}


class TestWholeGroups:
    def test_a_group_runs_when_it_is_whole(self, plugin):
        scheduler = made(plugin)
        scheduler.add_request(request("g2", 2, "g"))
        scheduler.add_request(request("g0", 0, "g"))
        assert step(scheduler) == {}
        assert scheduler.get_num_unfinished_requests() == 0  # nothing to do until the last one comes
        scheduler.add_request(request("alone"))
        assert step(scheduler) == {"alone": ([5], None)}
        scheduler.add_request(request("g1", 1, "g"))
        assert scheduler.get_num_unfinished_requests() == 4
        assert step(scheduler) == {"alone": ([5], None), **ALL}
        assert step(scheduler, dict.fromkeys(["g0", "g1", "g2"], 0))["g1"] == ([0], "stop")
        assert begun(scheduler)["g0"] == ([5], None)  # its name is free again

    def test_a_row_that_did_not_run_ends_the_group(self, plugin):
        scheduler = made(plugin)
        assert begun(scheduler) == ALL
        scheduler.cut = {"g1"}
        assert step(scheduler) == {f"g{member}": ([], "error") for member in range(3)}
        assert scheduler.requests == {}

    def test_different_tokens_end_the_group(self, plugin):
        scheduler = made(plugin)
        begun(scheduler)
        scheduler.add_request(request("alone"))
        told = step(scheduler, {"g2": 6})
        assert told == {"alone": ([5], None), **{f"g{member}": ([], "error") for member in range(3)}}

    def test_a_request_that_is_cancelled_ends_the_others(self, plugin):
        for early in (True, False):
            scheduler = made(plugin)
            if early:
                for member in range(2):
                    scheduler.add_request(request(f"g{member}", member, "g"))
            else:
                begun(scheduler)
            (ended,) = scheduler.finish_requests("g1", "aborted")
            assert (ended.request_id, ended.status) == ("g1", "aborted")
            others = ["g0"] if early else ["g0", "g2"]
            assert scheduler.get_num_unfinished_requests() == len(others)  # so that vLLM takes the step that tells them
            assert step(scheduler) == {name: ([], "error") for name in others}
            assert scheduler.get_num_unfinished_requests() == 0
            assert begun(scheduler) == ALL

    def test_all_are_ended(self, plugin):
        scheduler = made(plugin)
        begun(scheduler)
        scheduler.add_request(request("h0", 0, "h"))
        assert {each.request_id for each in scheduler.finish_requests(None, "aborted")} == {"g0", "g1", "g2", "h0"}
        assert step(scheduler) == {}

    def test_what_never_fits_is_ended_at_once(self, plugin):
        scheduler = made(plugin, blocks=5)  # a request of 2 + 4 tokens takes 2 of them
        assert begun(scheduler) == {f"g{member}": ([], "error") for member in range(3)}
        assert made(plugin, blocks=6).add_request(request("x")) is None
        assert begun(made(plugin, blocks=6)) == ALL

    def test_an_answer_ends_at_the_models_length(self, plugin):
        scheduler = made(plugin, blocks=16)
        scheduler.add_request(request("long", max_tokens=10_000))
        assert step(scheduler) == {"long": ([5], None)}

    def test_requests_of_a_group_are_alike(self, plugin):
        for other in ({"prompt": (1, 3)}, {"seed": 2}, {"max_tokens": 5}, {"temperature": 1}):
            scheduler = made(plugin)
            scheduler.add_request(request("g0", 0, "g"))
            scheduler.add_request(request("g1", 1, "g", **other))
            assert step(scheduler) == {"g1": ([], "error")}, other

    @pytest.mark.parametrize(
        ("change", "option"),
        [
            ({"async_scheduling": True}, "--no-async-scheduling"),
            ({"enable_chunked_prefill": True}, "--no-enable-chunked-prefill"),
            ({"policy": "priority"}, "--scheduling-policy fcfs"),
        ],
    )
    def test_options_that_part_groups_are_refused(self, plugin, change, option):
        with pytest.raises(ConfigError, match=option):
            made(plugin, **change)


class TestMixtureProcessor:
    def test_it_follows_vllms_batch(self, plugin):
        processor = plugin.processor.MixtureProcessor(config(), torch.device("cpu"), False)
        assert not processor.is_argmax_invariant()
        rows = [SimpleNamespace(extra_args=Membership("g", m, WEIGHTS).extra_args()) for m in range(3)]
        other = SimpleNamespace(extra_args=None)
        added = [(0, other, [1], []), *((m + 1, rows[m], [1], []) for m in range(3))]
        processor.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
        processor.update_state(None)
        torch.manual_seed(0)
        logits = torch.randn(4, 9)
        before = logits.clone()
        log_mixture = (torch.tensor(WEIGHTS).log()[:, None] + before[1:].log_softmax(-1)).logsumexp(0)
        assert (processor.apply(logits)[0] == before[0]).all()
        torch.testing.assert_close(logits[1:].log_softmax(-1), log_mixture.expand(3, 9))
        moved = [(0, 3, "swap"), (3, 4, "one way")]  # member 2 to place 0, the other row to place 4
        processor.update_state(SimpleNamespace(removed=[], added=[], moved=moved))
        logits = torch.cat([before[[3, 1, 2]], before[:1], before[:1]])
        processor.apply(logits)
        torch.testing.assert_close(logits[:3].log_softmax(-1), log_mixture.expand(3, 9))
        assert (logits[3:] == before[0]).all()

    def test_it_needs_its_scheduler(self, plugin):
        for name in (None, "other.Scheduler"):
            with pytest.raises(ConfigError, match=f"--scheduler-cls {SCHEDULER}"):
                plugin.processor.MixtureProcessor(config(scheduler_cls=name), torch.device("cpu"), False)
        wrong = config()
        wrong.model_config.logprobs_mode = "processed_logprobs"
        with pytest.raises(ConfigError, match="--logprobs-mode"):
            plugin.processor.MixtureProcessor(wrong, torch.device("cpu"), False)
        wrong = config()
        wrong.additional_config = {"renyi": {"prot": 1}}
        with pytest.raises(ConfigError, match=r"renyi\.prot"):
            plugin.processor.MixtureProcessor(wrong, torch.device("cpu"), False)

    def test_what_would_not_be_the_mixture_is_refused(self, plugin):
        def params(**given):
            extra = Membership("g", 0, WEIGHTS).extra_args()
            return SimpleNamespace(**{"extra_args": extra, "n": 1, "temperature": 0.0, "seed": None, **given})

        check = plugin.processor.MixtureProcessor.validate_params
        check(params())
        check(params(temperature=1.0, seed=0))
        check(params(extra_args=None, n=3, temperature=1.0))
        for given, where in (
            ({"n": 2}, "n"),
            ({"temperature": 1.0}, "seed"),
            ({"logit_bias": {1: 2.0}}, "logit_bias"),
            ({"min_tokens": 1}, "min_tokens"),
            ({"stop": ["x"]}, "stop"),
            ({"structured_outputs": object()}, "structured_outputs"),
            ({"extra_args": {"renyi_group": "g"}}, "renyi_group"),
        ):
            with pytest.raises(ConfigError) as error:
                check(params(**given))
            assert error.value.where == where
