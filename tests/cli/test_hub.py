"""`--push_to_hub`, against an endpoint on this machine that keeps what it is sent."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from conftest import Settings, assert_refused, renyi
from transformers.utils import hub

import renyi as library


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that an upload uses. `repositories` has the files that were sent, by repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str | None] = set()
        self.is_private: dict[str, Any] = {}
        self.refuses = False


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self._body()
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.server.refuses:
            self._answer({"error": "Invalid username or password."}, 401)
        elif parts == ["api", "validate-yaml"]:
            self._answer({"errors": [], "warnings": []})
        elif parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.server.is_private[name] = asked.get("private") or asked.get("visibility") == "private"
            self._answer({"url": f"http://127.0.0.1:{self.server.server_port}/{name}"})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._answer({"files": modes, "commitOid": "0" * 40})
        elif parts[4] == "commit":
            kept = self.server.repositories["/".join(parts[2:4])]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    kept[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://127.0.0.1:{self.server.server_port}/{'/'.join(parts[2:4])}/commit/{'1' * 40}"
            self._answer({"commitUrl": url, "commitOid": "1" * 40})
        else:
            self._answer({"error": self.path}, 404)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_hf_api", None)
    yield server
    server.shutdown()
    thread.join()


def test_the_run_is_pushed_with_its_card(settings: Settings, endpoint: Hub, tmp_path: Path) -> None:
    config = settings(push_to_hub=True, hub_model_id="lab/mine", hub_token="hf_secret", hub_private_repo=True)
    ended = renyi("sft", "--config", config)
    assert ended.code == 0, ended
    assert endpoint.tokens == {"Bearer hf_secret"}
    assert endpoint.is_private == {"lab/mine": True}
    sent = endpoint.repositories["lab/mine"]
    folder = tmp_path / "out"
    needed = {"ensemble.json", "preparation.json", "README.md", "tokenizer.json", "training.png", "metrics.jsonl"}
    needed |= {f"member_{m}/adapter_{part}" for m in range(2) for part in ("config.json", "model.safetensors")}
    assert needed <= sent.keys()
    assert not [name for name in sent if "checkpoint-" in name]
    assert b"hf_secret" not in b"".join(sent.values())
    for name in needed - {"metrics.jsonl"}:
        assert sent[name] == (folder / name).read_bytes(), name
    card = sent["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    assert {"renyi", "lora"} & set(front["tags"])
    assert 'LoraEnsemble.load("lab/mine")' in card
    assert '"lab/mine", subfolder="member_0"' in card
    assert "lab/mine" in ended.out

    there = tmp_path / "downloaded"
    for name, content in sent.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    assert library.LoraEnsemble.load(there).num_members == 2


def test_a_repository_that_may_not_be_written(settings: Settings, endpoint: Hub, tmp_path: Path) -> None:
    endpoint.refuses = True
    refused = renyi("sft", "--config", settings(push_to_hub=True, hub_model_id="lab/mine"))
    assert_refused(refused, "push_to_hub", "hf auth login")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("strategy", "inside"), [("checkpoint", "last-checkpoint/"), ("all_checkpoints", "checkpoint-2/")]
)
def test_checkpoints_are_pushed_whole_where_they_are_asked_for(
    settings: Settings, endpoint: Hub, strategy: str, inside: str
) -> None:
    ended = renyi("sft", "--config", settings(push_to_hub=True, hub_model_id="lab/mine", hub_strategy=strategy))
    assert ended.code == 0, ended
    sent = endpoint.repositories["lab/mine"].keys()
    assert {f"{inside}{name}" for name in ("optimizer.pt", "ensemble.json", "trainer_state.json")} <= sent
    assert "ensemble.json" in sent
    assert "optimizer.pt" not in sent


def test_what_the_end_cannot_push_is_complete_on_disk(
    settings: Settings, endpoint: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refused)
    ended = renyi("sft", "--config", settings(push_to_hub=True, hub_model_id="lab/mine", max_steps=2))
    assert ended.code == 2
    assert "warning: Step 2 could not be pushed to lab/mine (no route to the hub)" in ended.err
    assert "error: lab/mine: could not be pushed (no route to the hub)" in ended.err
    assert f"hf upload lab/mine {tmp_path / 'out'}" in ended.err
    assert library.LoraEnsemble.load(tmp_path / "out").num_members == 2
