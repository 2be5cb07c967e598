"""`renyi serve`: a server in a process of its own, and what it refuses before it loads anything."""

import json
import socket
import time
from pathlib import Path

import httpx
from conftest import assert_refused, renyi
from processes import running
from serving import tiny_folder


def test_wrong_flags_are_refused(tmp_path: Path) -> None:
    assert_refused(renyi("serve", tmp_path, "--host", "0.0.0.0"), "--host", "there is no key", "--api_key")
    assert_refused(renyi("serve", tmp_path, "--port", "70000"), "--port", "70000")
    assert_refused(renyi("serve", tmp_path, "--max_running", "0"), "--max_running", "is 0")
    assert_refused(renyi("serve", tmp_path, "--max_token", "5"), "--max_token", "max_tokens")
    assert_refused(renyi("serve", tmp_path / "nowhere"), "nowhere")


def test_a_server_runs_and_ends_at_sigterm(tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    flags = ["--port", port, "--device", "cpu", "--model_name", "ours"]
    url = f"http://127.0.0.1:{port}"
    with running("serve", tmp_path / "tiny", *flags, environment={"RENYI_API_KEY": "k3y"}) as (process, said):
        ends = time.monotonic() + 180
        while time.monotonic() < ends and process.is_alive():
            try:
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx.ConnectError:
                time.sleep(0.1)
        headers = {"authorization": "Bearer k3y"}
        body = {"model": "ours", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 3}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        assert reply.status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        process.terminate()
        process.join(120)
        err = said.read_text(encoding="utf-8")
    assert process.exitcode == 0
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    ended = [(line["route"], line["status"]) for line in lines]
    assert ended == [("/v1/chat/completions", 200), ("/v1/models", 401)]
    assert f"on http://127.0.0.1:{port}" in err
    assert "k3y" not in err
