"""A stand-in for `vllm serve` with the plugin: vLLM's HTTP API and our own admission, mixing and records around a tiny
ensemble, without vLLM. It can be told to break a group. It asserts nothing.
"""

import asyncio
import json
import secrets
import socket
import threading
import time
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from renyi.ensemble import LoraEnsemble
from renyi.vllm.admission import Admission, Need, Room
from renyi.vllm.groups import membership_of
from renyi.vllm.mixing import Mixing
from renyi.vllm.records import FORMAT, Broadcaster


class FakeVllm:
    """Serves members 0 to M − 1 of an ensemble.

    Attributes:
        fault: None, or "row" (after two tokens a step runs without the last row), "token" (the last row then gets
            another token), "end" (the last row's stream then ends), "error" (vLLM ends the requests), "refuse" (no
            group is admitted).
        cancelled: names of requests whose clients went away.
        begun: groups that were run.
        open, most: requests that are open, and the most that ever were.
    """

    def __init__(self, ensemble: LoraEnsemble, names: list[str], rows: int = 64):
        self.fault: str | None = None
        self.cancelled: list[str] = []
        self.begun = self.open = self.most = 0
        self.seconds = 0.0
        self._ensemble, self._names = ensemble, names
        facts = {"format": FORMAT, "rows": rows, "step_tokens": 256, "positions": 128, "adapters": len(names)}
        self.records = Broadcaster("127.0.0.1", 0, None, facts)
        self._admission = Admission(Room(rows, 256, 1000, len(names)))
        self._queues: dict[str, asyncio.Queue[Any]] = {}
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self._app(), log_config=None, timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._socket])), daemon=True)

    @property
    def address(self) -> str:
        return f"{self.url},http://127.0.0.1:{self.records.port}"

    def __enter__(self) -> "FakeVllm":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self.records.close()

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> Any:
            return {"data": [{"id": name} for name in ["base", *self._names]]}

        @app.post("/v1/completions", response_model=None)
        async def completions(request: Request) -> Any:
            body = await request.json()
            if body.get("prompt_logprobs") is not None:
                return self._scored(body)
            name = secrets.token_hex(4)
            queue = self._queues[name] = asyncio.Queue()
            membership = membership_of(body["vllm_xargs"])
            if self.fault == "refuse" and membership.size > 1:
                return JSONResponse({"error": {"message": "Internal server error"}}, 500)
            like = {key: value for key, value in body.items() if key not in ("model", "vllm_xargs")}
            adapter = self._names.index(body["model"])
            need = Need(len(body["prompt"]), 1, adapter)
            if reason := self._admission.add(name, (name, membership, body), membership, need, like):
                return JSONResponse({"error": {"message": reason}}, 400)
            for group in self._admission.next(0, 0):
                self.begun += 1
                task = asyncio.create_task(self._run(group))
                task.add_done_callback(lambda task, group=group: self._admission.forget(list(group.names)))

            async def lines() -> Any:
                self.open += 1
                self.most = max(self.most, self.open)
                try:
                    while (item := await queue.get()) is not None:
                        yield f"data: {json.dumps(item)}\n\n"
                    yield "data: [DONE]\n\n"
                except asyncio.CancelledError:
                    self.cancelled.append(name)
                    raise
                finally:
                    self.open -= 1

            return StreamingResponse(lines(), media_type="text/event-stream")

        return app

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        """[M, T, V]"""
        with torch.inference_mode():
            ids = torch.tensor([tokens]).repeat(len(self._names), 1)
            return self._ensemble.base(input_ids=ids).logits.float().clone()

    def _scored(self, body: Any) -> Any:
        log_p = self._logits(body["prompt"]).log_softmax(-1)[self._names.index(body["model"])]
        found: list[Any] = [None]
        for at, token in enumerate(body["prompt"][1:]):
            named = [*log_p[at].topk(body["prompt_logprobs"]).indices.tolist(), token]
            found.append({str(t): {"logprob": float(log_p[at, t])} for t in named})
        return {"choices": [{"prompt_logprobs": found}]}

    async def _run(self, group: Any) -> None:
        rows = [group.requests[member] for member in range(group.size)]
        body = rows[0][2]
        outputs: list[list[int]] = [[] for _ in rows]
        mixing = Mixing(self.records.tell)
        mixing.update([], [(i, membership, outputs[i]) for i, (_, membership, _) in enumerate(rows)], [])
        generator = torch.Generator().manual_seed(body["seed"] % 2**63)
        faulty = self.fault
        while True:
            await asyncio.sleep(self.seconds)
            members = [self._names.index(body["model"]) for _, _, body in rows]
            raw = self._logits([*body["prompt"], *outputs[0]])[members, -1]
            is_late = len(outputs[0]) == 2
            if faulty == "row" and is_late:
                mixing.update([len(rows) - 1], [], [])
            mixed = mixing.apply(raw.clone())[0]
            if body["temperature"] == 0:
                token = int(mixed.argmax())
            else:
                token = int(torch.multinomial((mixed / body["temperature"]).softmax(-1), 1, generator=generator))
            is_end = token in body["stop_token_ids"] or len(outputs[0]) + 1 == body["max_tokens"]
            for i, (name, _, _) in enumerate(rows):
                queue, is_last = self._queues[name], i == len(rows) - 1
                if faulty == "error" and is_late:
                    queue.put_nowait({"error": {"message": "Internal server error"}})
                    continue
                if faulty == "end" and is_late and is_last:
                    queue.put_nowait(None)
                    continue
                mine = token + 1 if faulty == "token" and is_late and is_last else token
                outputs[i].append(token)
                log_p = float(raw[i].log_softmax(-1)[mine])
                queue.put_nowait({"choices": [{"token_ids": [mine], "logprobs": {"token_logprobs": [log_p]}}]})
                if is_end:
                    queue.put_nowait(None)
            if is_end or (faulty == "error" and is_late):
                return
