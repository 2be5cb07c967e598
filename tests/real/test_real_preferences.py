"""The real preference pairs, as they are, through the real command on the real small model."""

import json
from pathlib import Path

import pytest

from renyi.cli.main import main

SHARED = Path(__file__).parents[2].parent / "shared"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the real model and data are not beside the project")
def test_real_pairs_train_as_they_are(tmp_path, capsys):
    template, out = tmp_path / "chat.jinja", tmp_path / "out"
    template.write_text(TEMPLATE, encoding="utf-8")
    data = str(SHARED / "data" / "dpo_en_demo.json")
    settings = {
        "model_name_or_path": SHARED / "models" / "tinystories-656k",
        "dataset_name": data,
        "output_dir": out,
        "chat_template_path": template,
        "truncation_mode": "keep_end",  # prompts fill this model's context
        "max_length": 96,
        "num_members": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "alpha_hold_ratio": 0.0,
        "alpha_ramp_ratio": 0.0,
        "use_cpu": True,
        "bf16": False,
    }
    assert main(["dpo", *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-4)  # both members are the reference still
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert rows[3]["member_load/0"] + rows[3]["member_load/1"] == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "ShareGPT pairs" in printed
    assert "300 pairs" in printed

    held_out = tmp_path / "some.json"
    held_out.write_text(json.dumps(json.loads(Path(data).read_text("utf-8"))[:12]), encoding="utf-8")
    assert main(["evaluate", str(out), str(held_out), "--task", "preference", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluation["pairs"] == 12
    assert 0 < evaluation["mixture"]["nll"] < 2
