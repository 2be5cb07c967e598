"""The plugin inside a real vLLM, on an ensemble that was trained and exported: `make vllm` runs this, in minutes.

VLLM_PYTHON names the Python of an environment with vLLM. Answers are those of `LoraEnsemble.generate`, and samples have
the mixture's probabilities, which are computed by enumeration.
"""

import asyncio
import json
import os
import random
import shlex
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import httpx
import pytest
import torch
from enumerable import enumerate_sequences
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from renyi import load, runs
from renyi.runs.export import export_adapters
from renyi.serve.engine import EngineRequest
from renyi.serve.replica import address_of
from renyi.serve.vllm import VllmEngine
from renyi.vllm.groups import Membership

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="VLLM_PYTHON names no Python with vLLM; docs/serving.md says how to make one"
    ),
]
V, EOS, MEMBERS = 8, 0, 3
ROOT = Path(__file__).parents[2]


def trained(folder: Path) -> Path:
    """A folder that a run of `renyi sft` left: three members, on texts of three kinds that contradict each other."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,  # vLLM's attention on a CPU takes heads of 32 or more
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    )
    words = ["<eos>", "<unk>", *(f"w{i}" for i in range(V - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    model.save_pretrained(folder / "base")
    wrapped.save_pretrained(folder / "base")
    chance = random.Random(0)
    rows = []
    for _ in range(300):
        stride, at, text = chance.choice([1, 2, 4]), chance.randrange(6), []
        for _ in range(chance.randint(3, 24)):
            text.append(f"w{at}")
            at = chance.randrange(6) if chance.random() < 0.3 else (at + stride) % 6
        rows.append(json.dumps({"text": " ".join(text)}) + "\n")
    (folder / "texts.jsonl").write_text("".join(rows))
    runs.run(
        runs.Settings.of(
            "sft",
            model_name_or_path=str(folder / "base"),
            dataset_name=str(folder / "texts.jsonl"),
            num_members=MEMBERS,
            lora_r=8,
            learning_rate=1e-2,
            max_steps=60,
            per_device_train_batch_size=16,
            alpha=0.9,
            gradient_checkpointing=False,
            output_dir=str(folder / "run"),
        )
    )
    return folder / "run"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Served:
    """`vllm serve` with an exported ensemble, and the ensemble itself."""

    def __init__(self, folder: Path):
        run = trained(folder)
        export = export_adapters(run, folder / "export", mixture=True)
        self.loaded = load(run, device="cpu")
        port, records = free_port(), free_port()
        self.url, self.address = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port},http://127.0.0.1:{records}"
        start = "from vllm.entrypoints.cli.main import main; main()"
        command = [PYTHON, "-c", start, *shlex.split(export.command)[1:]]
        command += ["--port", str(port), "--additional-config", f'{{"renyi": {{"port": {records}}}}}']
        command += ["--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.15"]
        command += ["--max-model-len", "128", "--max-num-seqs", "180", "--max-num-batched-tokens", "1024"]
        own = {"PYTHONPATH": str(ROOT / "src"), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.log = folder / "vllm.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        ends = time.monotonic() + 600
        while time.monotonic() < ends and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def answers(self, *requests: EngineRequest) -> list:
        return asyncio.run(self.answered(requests))

    async def answered(self, requests) -> list:
        engine = VllmEngine(self.loaded.folder, [address_of(self.address)], most=10_000)
        await engine.start()
        try:
            return await asyncio.gather(*(collected(engine.submit(request)) for request in requests))
        finally:
            await engine.stop()

    @property
    def broken(self) -> int:
        """Groups that were ended with an error so far."""
        return self.log.read_text().count("the group was ended")


async def collected(stream) -> list:
    return [token async for token in stream]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    running = Served(tmp_path_factory.mktemp("real"))
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def prompts(several: int, longest: int = 60) -> list[list[int]]:
    chance = random.Random(1)
    return [[chance.randrange(2, V) for _ in range(chance.randint(1, longest))] for _ in range(several)]


@pytest.mark.parametrize("mixture", ["sequence", "token"])
def test_greedy_answers_of_mixed_lengths_are_our_own(served, mixture):
    """200 groups at once, prompts of 1 to 60 and answers of 1 to 40 tokens, of which at most 60 fit into a batch."""
    chance = random.Random(2)
    asked = [
        EngineRequest(ids, chance.randint(1, 40), end_tokens=[EOS], settings={"do_sample": False}, mixture=mixture)
        for ids in prompts(200)
    ]
    before = served.broken
    answers = served.answers(*asked)
    assert served.broken == before
    epistemic = 0.0
    for request, answer in zip(asked, answers, strict=True):
        ours = served.loaded.ensemble.generate(
            torch.tensor([request.prompt]),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=EOS,
            mixture=mixture,
        )
        assert [token.token for token in answer] == ours.new_tokens[0].tolist()
        for name in ("log_prob", "total", "aleatoric", "epistemic"):
            assert [getattr(token, name) for token in answer] == pytest.approx(
                getattr(ours, name)[0].tolist(), abs=1e-4
            )
        weights = torch.tensor([token.weights for token in answer], dtype=torch.float64)
        torch.testing.assert_close(weights, ours.weights[:, 0].T, rtol=0, atol=1e-3)
        epistemic = max(epistemic, float(ours.epistemic.max()))
    assert epistemic > 0.05  # the members differ, so that a member alone would not have answered so


@pytest.mark.parametrize("mixture", ["sequence", "token", "sampled"])
def test_samples_have_the_mixtures_probabilities(served, mixture):
    """Total variation between 1,500 samples and the enumerated distribution is what chance makes it."""
    several, length, prompt = 1500, 3, [2, 3, 5]
    asked = [
        EngineRequest(
            prompt,
            length,
            end_tokens=[EOS],
            settings={"temperature": 1.0, "top_k": 0, "top_p": 1.0},
            seed=7_000_003 * seed % 2**31,  # seeds that are far apart
            mixture=mixture,
        )
        for seed in range(several)
    ]
    sequences, tokens = enumerate_sequences(V, length, EOS)
    exact = {name: probabilities(served, prompt, sequences, tokens, name) for name in ("sequence", "token")}
    index = {tuple(row[:n].tolist()): i for i, (row, n) in enumerate(zip(sequences, tokens, strict=True))}
    counts = torch.zeros(len(sequences), dtype=torch.float64)
    for answer in served.answers(*asked):
        counts[index[tuple(token.token for token in answer)]] += 1
    p = exact["token" if mixture == "token" else "sequence"]
    found = float((counts / several - p).abs().sum() / 2)
    drawn = torch.distributions.Multinomial(several, p)
    torch.manual_seed(0)
    chance = torch.stack([(drawn.sample() / several - p).abs().sum() / 2 for _ in range(400)])
    print(f"{mixture}: total variation {found:.4f}; by chance {float(chance.mean()):.4f} ± {float(chance.std()):.4f}")
    assert found < float(chance.mean() + 4 * chance.std())


def probabilities(served, prompt, sequences, tokens, mixture) -> torch.Tensor:
    """p(sequence | prompt) of all sequences under a mixture, float64."""
    ensemble = served.loaded.ensemble
    ids = torch.cat([torch.tensor([prompt]).expand(len(sequences), -1), sequences.clamp(min=0)], dim=1)
    with torch.inference_mode():
        logits = ensemble.base(input_ids=ids.repeat(MEMBERS, 1)).logits.double().view(MEMBERS, len(ids), -1, V)
    log_p = logits[:, :, len(prompt) - 1 : -1].log_softmax(-1)
    log_p = log_p.gather(-1, sequences.clamp(min=0).expand(MEMBERS, -1, -1)[..., None]).squeeze(-1)
    there = torch.arange(sequences.shape[1]) < tokens[:, None]
    weights = ensemble.weights.double().log()
    if mixture == "sequence":
        return (weights[:, None] + (log_p * there).sum(-1)).logsumexp(0).exp()
    return ((weights[:, None, None] + log_p).logsumexp(0) * there).sum(-1).exp()


def test_scores_are_our_own(served):
    rows = [{"text": f"w1 w{i % 6} w3 w{(i + 2) % 6} w5"} for i in range(12)]

    async def main():
        engine = VllmEngine(served.loaded.folder, [address_of(served.address)])
        await engine.start()
        try:
            return await engine.score(rows)
        finally:
            await engine.stop()

    for found, ours in zip(asyncio.run(main()), served.loaded.score(rows), strict=True):
        assert found.tokens == ours.tokens
        assert found.log_likelihood == pytest.approx(ours.log_likelihood, abs=1e-3)


def test_groups_that_are_cancelled_leave_the_others_right(served):
    asked = [EngineRequest(ids, 40, end_tokens=[], settings={"do_sample": False}) for ids in prompts(40, 20)]

    async def main():
        engine = VllmEngine(served.loaded.folder, [address_of(served.address)])
        await engine.start()
        streams = [engine.submit(request) for request in asked]
        for stream in streams[::2]:
            await anext(stream)
            stream.cancel()
        answers = await asyncio.gather(*map(collected, streams[1::2]))
        async with httpx.AsyncClient() as client:
            for _ in range(50):
                metrics = (await client.get(f"{served.url}/metrics")).text
                running = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
                if all(float(line.split()[-1]) == 0 for line in running):
                    break
                await asyncio.sleep(0.2)
        await engine.stop()
        return answers, running

    answers, running = asyncio.run(main())
    assert running
    assert all(float(line.split()[-1]) == 0 for line in running)
    for request, answer in zip(asked[1::2], answers, strict=True):
        ours = served.loaded.ensemble.generate(
            torch.tensor([request.prompt]), max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=EOS
        )
        assert [token.token for token in answer] == ours.new_tokens[0].tolist()


def post(served, rows) -> list[httpx.Response]:
    """Send requests of vLLM's own API at once: (membership, changes of the body)."""

    async def main():
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(
                *(
                    client.post(
                        f"{served.url}/v1/completions",
                        json={
                            "model": f"member_{membership.member}",
                            "prompt": [2, 3],
                            "max_tokens": 4,
                            "temperature": 0,
                            "vllm_xargs": membership.extra_args(),
                            **changes,
                        },
                    )
                    for membership, changes in rows
                )
            )

    return asyncio.run(main())


def test_what_is_no_group_is_refused_and_named(served):
    def group(name, changes=({}, {}, {})):
        return [(Membership(name, m, (0.5, 0.3, 0.2)), changes[m]) for m in range(MEMBERS)]

    for changes, message in (
        ({"temperature": 1}, "seed"),
        ({"n": 2, "temperature": 1, "seed": 1}, "n: is not possible for a request of a group"),
        ({"stop": ["w3"]}, "stop"),
        ({"logit_bias": {"3": 5}}, "logit_bias"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"vllm_xargs": {"renyi_group": "x"}}, "renyi_member"),
    ):
        (refused,) = post(served, group("refused", [changes] * 3)[:1])
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
    right = post(served, group("right"))
    assert [response.status_code for response in right] == [200] * 3
    assert len({response.json()["choices"][0]["text"] for response in right}) == 1


def test_a_group_whose_requests_differ_is_ended(served):
    """The request that differs ends with an error; the others wait for theirs, and their client leaves."""

    async def main():
        async with httpx.AsyncClient(timeout=20) as client:

            def send(member, **changes):
                body = {
                    "model": f"member_{member}",
                    "prompt": [2, 3],
                    "max_tokens": 4,
                    "temperature": 0,
                    "vllm_xargs": Membership("differs", member, (0.5, 0.3, 0.2)).extra_args(),
                }
                return asyncio.ensure_future(client.post(f"{served.url}/v1/completions", json={**body, **changes}))

            first = send(0)
            await asyncio.sleep(1)
            refused = await send(1, prompt=[2, 4])
            assert refused.status_code == 500
            assert not first.done()
            first.cancel()
            await asyncio.sleep(1)

    before = served.broken
    asyncio.run(main())
    assert "differ in prompt, settings or seed" in served.log.read_text()
    assert served.broken > before
    (after,) = served.answers(EngineRequest([2, 3], 3, settings={"do_sample": False}))
    assert len(after) == 3
