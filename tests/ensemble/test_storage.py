"""The ensemble folder: what is written comes back, what is damaged is refused with a reason, what is whole survives."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, LoraModel, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import lora, padded_batch, scatter_members, tiny_ensemble, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from renyi import LoraEnsemble
from renyi.ensemble import storage
from renyi.errors import ConfigError, EnsembleFormatError, RenyiError, SaveError
from renyi.members import adapters


def scores(ensemble: LoraEnsemble) -> Tensor:
    with torch.no_grad():
        return ensemble.log_likelihood(*padded_batch())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def saved(tmp_path) -> Path:
    ensemble = tiny_ensemble(3)
    ensemble.weights.copy_(torch.tensor([0.5, 0.3, 0.2]))
    ensemble.alpha, ensemble.routing_quantity = 0.7, "length_normalised"
    ensemble.save(tmp_path / "ensemble")
    return tmp_path / "ensemble"


# What is written comes back


def test_a_folder_comes_back_bitwise(saved):
    ensemble, loaded = tiny_ensemble(3), LoraEnsemble.load(saved, base=tiny_model()).eval()
    assert torch.equal(scores(loaded), scores(ensemble))
    assert torch.equal(loaded.weights, torch.tensor([0.5, 0.3, 0.2]))
    assert (loaded.alpha, loaded.routing_quantity, loaded.num_members) == (0.7, "length_normalised", 3)
    for member in range(3):
        for name, (lora_a, lora_b) in ensemble.adapter(member).items():
            assert torch.equal(loaded.adapter(member)[name][0], lora_a)
            assert torch.equal(loaded.adapter(member)[name][1], lora_b)


def test_the_folder_is_laid_out_as_promised(saved):
    files = {
        "ensemble.json",
        *(f"member_{m}/{f}" for m in range(3) for f in ("adapter_config.json", "adapter_model.safetensors")),
    }
    assert {name for name in contents(saved) if not name.endswith("README.md")} == files
    manifest = json.loads((saved / "ensemble.json").read_text())
    assert manifest["members"] == ["member_0", "member_1", "member_2"]
    assert manifest["weights"] == pytest.approx([0.5, 0.3, 0.2])
    assert manifest["alpha"] == 0.7
    assert manifest["format_version"] == 1


def test_saving_again_writes_the_same_bytes(saved, tmp_path):
    LoraEnsemble.load(saved, base=tiny_model()).save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_a_base_given_by_its_folder_is_found_again(tmp_path, monkeypatch):
    """`ensemble.json` names the base absolutely, so the ensemble loads from any working directory."""
    tiny_model().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    ensemble = scatter_members(LoraEnsemble.from_base("base", 2, lora())).eval()
    ensemble.save(tmp_path / "ensemble")
    monkeypatch.chdir("/")
    assert torch.equal(scores(LoraEnsemble.load(tmp_path / "ensemble").eval()), scores(ensemble))


def test_an_adapter_that_peft_wrote_loads_as_a_member(tmp_path):
    """And one that this library wrote gives PEFT the same numbers: see test_joint_forward."""
    folders, expected = [], []
    input_ids, mask = padded_batch()
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model(), lora(init_lora_weights=False))
        model.save_pretrained(tmp_path / f"a{seed}")
        folders.append(tmp_path / f"a{seed}")
        expected.append(model.eval()(input_ids=input_ids, attention_mask=mask).logits)
    ensemble = LoraEnsemble.load(folders, base=tiny_model()).eval()
    assert torch.equal(ensemble.weights, torch.tensor([0.5, 0.5]))
    error = (ensemble.logits(input_ids, mask) - torch.stack(expected)).abs() * mask[..., None]
    assert error.max() <= 1e-5


def test_a_list_of_members_keeps_its_order(saved):
    picked = LoraEnsemble.load([saved / "member_2", str(saved / "member_0")], base=tiny_model()).eval()
    torch.testing.assert_close(scores(picked), scores(tiny_ensemble(3))[[2, 0]])


def test_a_hub_id_is_downloaded(saved, monkeypatch):
    asked = []
    monkeypatch.setattr(storage, "snapshot_download", lambda name, **_: asked.append(name) or str(saved))
    loaded = LoraEnsemble.load("somebody/ensemble", base=tiny_model()).eval()
    assert asked == ["somebody/ensemble"]
    assert torch.equal(scores(loaded), scores(tiny_ensemble(3)))


def test_restore_brings_back_members_weights_and_alpha(saved):
    ensemble = tiny_ensemble(3, scattered=False)
    parameters = ensemble.stack.parameters()
    ensemble.restore(saved)
    assert torch.equal(scores(ensemble), scores(tiny_ensemble(3)))
    assert torch.equal(ensemble.weights, torch.tensor([0.5, 0.3, 0.2]))
    assert ensemble.alpha == 0.7
    # In place, so that an optimizer goes on with the same parameters.
    assert all(before is after for before, after in zip(parameters, ensemble.stack.parameters(), strict=True))


def test_restore_refuses_another_number_of_members(saved):
    with pytest.raises(EnsembleFormatError, match="holds 3 members, not 2"):
        tiny_ensemble(2).restore(saved)


# Adding, dropping, merging


def test_an_added_member_comes_last_with_a_fair_weight(saved):
    ensemble = LoraEnsemble.load([saved / "member_2", saved / "member_0"], base=tiny_model()).eval()
    ensemble.weights.copy_(torch.tensor([0.75, 0.25]))
    ensemble.add_member(saved / "member_1")
    assert ensemble.num_members == 3
    torch.testing.assert_close(ensemble.weights, torch.tensor([0.5, 1 / 6, 1 / 3]))
    torch.testing.assert_close(scores(ensemble), scores(tiny_ensemble(3))[[2, 0, 1]])
    assert all(p.requires_grad for p in ensemble.stack.parameters())


def test_a_dropped_member_leaves_the_others_and_their_ratios(saved, tmp_path):
    ensemble = LoraEnsemble.load(saved, base=tiny_model()).eval()
    ensemble.drop_member(1)
    torch.testing.assert_close(ensemble.weights, torch.tensor([5 / 7, 2 / 7]))
    torch.testing.assert_close(scores(ensemble), scores(tiny_ensemble(3))[[0, 2]])
    ensemble.save(saved)  # over the three that were there
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["member_0", "member_1"]
    assert torch.equal(scores(LoraEnsemble.load(saved, base=tiny_model()).eval()), scores(ensemble))


@pytest.mark.parametrize("member", [-1, 3])
def test_dropping_nobody_is_refused(member):
    with pytest.raises(ConfigError, match="cannot drop"):
        tiny_ensemble(3).drop_member(member)


def test_the_last_member_cannot_be_dropped():
    with pytest.raises(ConfigError, match="cannot drop"):
        tiny_ensemble(1).drop_member(0)


def test_a_member_that_does_not_fit_leaves_the_ensemble_as_it_was(saved, tmp_path):
    get_peft_model(tiny_model(), lora(target_modules=["q_proj"])).save_pretrained(tmp_path / "other")
    ensemble = LoraEnsemble.load(saved, base=tiny_model()).eval()
    before, weights = scores(ensemble), ensemble.weights.clone()
    with pytest.raises(EnsembleFormatError, match="adapts other layers"):
        ensemble.add_member(tmp_path / "other")
    assert ensemble.num_members == 3
    assert torch.equal(ensemble.weights, weights)
    assert torch.equal(scores(ensemble), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_a_merged_member_is_a_plain_model_that_answers_alike(kind, tmp_path):
    ensemble = tiny_ensemble(3, kind)
    input_ids, mask = padded_batch()
    joint = ensemble.logits(input_ids, mask)
    merged = ensemble.merged(1)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert type(merged) is type(tiny_model(kind))
    logits = merged(input_ids=input_ids, attention_mask=mask).logits
    assert ((logits - joint[1]) * mask[..., None]).abs().max() <= 1e-5
    assert torch.equal(ensemble.logits(input_ids, mask), joint)  # the ensemble itself is as it was
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=input_ids, attention_mask=mask).logits, logits)


def test_a_model_carries_one_ensemble_only():
    model = tiny_model()
    LoraEnsemble.from_base(model, 2, lora())
    with pytest.raises(ConfigError, match="already carries an ensemble"):
        LoraEnsemble.from_base(model, 2, lora())


# Damaged folders are refused, each with what is wrong, where, and what to do


def refused(path, *parts: str, error: type[RenyiError] = EnsembleFormatError, base=None) -> None:
    with pytest.raises(error) as caught:
        LoraEnsemble.load(path, base=base or tiny_model())
    for part in parts:
        assert part in str(caught.value)


def test_no_folder(tmp_path, monkeypatch):
    def offline(name, **_):
        raise OSError("no network")

    monkeypatch.setattr(storage, "snapshot_download", offline)
    refused(tmp_path / "nowhere", "nowhere", "no such folder")


def test_an_empty_list():
    refused([], "the list of adapters is empty")


def test_a_folder_without_a_manifest(saved):
    (saved / "ensemble.json").unlink()
    refused(saved, str(saved), "there is no ensemble.json", "interrupted")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"members": []}', "\x00"])
def test_a_corrupt_manifest(saved, text):
    (saved / "ensemble.json").write_text(text)
    refused(saved, str(saved / "ensemble.json"), "cannot be read")


def test_a_manifest_of_a_newer_format(saved):
    manifest = json.loads((saved / "ensemble.json").read_text())
    (saved / "ensemble.json").write_text(json.dumps({**manifest, "format_version": 2, "members": {"new": "form"}}))
    with pytest.raises(EnsembleFormatError) as caught:
        LoraEnsemble.load(saved, base=tiny_model())
    assert "format version 2 is newer than this renyi reads (1)" in str(caught.value)
    assert "Upgrade renyi" in str(caught.value)
    assert "cannot be read" not in str(caught.value)


def test_fields_of_later_versions_are_ignored(saved):
    manifest = json.loads((saved / "ensemble.json").read_text())
    (saved / "ensemble.json").write_text(json.dumps({**manifest, "colour": "blue"}))
    assert LoraEnsemble.load(saved, base=tiny_model()).num_members == 3


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=8) | st.just("member_0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(["base_model", "members", "weights", "alpha", "routing_quantity", "format_version"]),
    value=_json,
)
def test_whatever_a_manifest_holds_it_is_read_or_refused(saved, field, value):
    """No other error ever escapes, and what is read makes sense."""
    manifest = {"base_model": "b", "members": ["member_0", "member_1"], "weights": [0.5, 0.5], "alpha": 0.8}
    (saved / "ensemble.json").write_text(json.dumps({**manifest, field: value}))
    try:
        read = storage.read_manifest(saved)
    except EnsembleFormatError:
        return
    assert len(read.members) == len(read.weights) > 0
    assert sum(read.weights) == pytest.approx(1, abs=1e-3)
    assert all(weight >= 0 for weight in read.weights)
    assert all((saved / member).is_dir() for member in read.members)
    assert 0 <= read.alpha <= 1


def test_a_missing_member_folder(saved):
    shutil.rmtree(saved / "member_1")
    refused(saved, str(saved / "ensemble.json"), "names member_1")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_member_file(saved, name):
    (saved / "member_1" / name).unlink()
    refused(saved, str(saved / "member_1"), f"there is no {name}")


@pytest.mark.parametrize("kept", [0, 5, 100, 2000, -1])
def test_truncated_weights(saved, kept):
    file = saved / "member_1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(saved, str(file), "damaged or cut short", "earlier checkpoint")


def test_a_corrupt_adapter_config(saved):
    file = saved / "member_1" / "adapter_config.json"
    file.write_text('{"peft_type": "LORA", ')
    refused(saved, str(file), "cannot be read")


@pytest.mark.parametrize("lost", [".lora_A.weight", ".lora_B.weight"])
def test_half_a_pair_of_matrices(saved, lost):
    file = saved / "member_1" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if key.endswith(lost))]
    save_file(tensors, file)
    refused(saved, str(file))


def test_other_than_lora_weights(saved):
    file = saved / "member_1" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(2)}, file)
    refused(saved, str(file), "base_model.model.lm_head.weight", "is not LoRA")


def test_members_of_different_ranks(saved, tmp_path):
    tiny_ensemble(1, r=2).save(tmp_path / "other")
    refused([saved / "member_0", tmp_path / "other" / "member_0"], "r is 2, but 4", "member_0")


def test_members_of_different_scaling(saved, tmp_path):
    tiny_ensemble(1, lora_alpha=32).save(tmp_path / "other")
    refused([saved / "member_0", tmp_path / "other" / "member_0"], "lora_alpha is 32, but 8")


def test_members_of_different_targets(saved, tmp_path):
    tiny_ensemble(1, target_modules=["q_proj"]).save(tmp_path / "other")
    refused([saved / "member_0", tmp_path / "other" / "member_0"], "adapts other layers")


def test_a_base_of_another_width(saved):
    refused(saved, "has shape", "base model", base=tiny_model(hidden_size=64))


def test_a_base_of_another_depth(saved):
    refused(saved, "adapts other layers", base=tiny_model(num_hidden_layers=1))


def test_a_base_of_another_kind(saved):
    refused(saved, error=RenyiError, base=tiny_model("gpt2"))


def test_a_base_that_is_not_named(saved):
    with pytest.raises(EnsembleFormatError, match="base model is not named"):
        LoraEnsemble.load(saved)


def test_a_base_that_is_gone(saved):
    manifest = json.loads((saved / "ensemble.json").read_text())
    (saved / "ensemble.json").write_text(json.dumps({**manifest, "base_model": "/gone/base"}))
    with pytest.raises(EnsembleFormatError, match="base model could not be loaded"):
        LoraEnsemble.load(saved)


# What an ensemble cannot be made of


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lora(use_dora=True), "use_dora"),
        (lora(modules_to_save=["lm_head"]), "modules_to_save"),
        (lora(target_modules=["lm_head"]), "language-model head"),
        (lora(target_modules=["q_proj", "lm_head"]), "language-model head"),
        (lora(target_modules=["embed_tokens"]), "embed_tokens"),
        (lora(target_modules=["no_such_layer"]), "no_such_layer"),
        (lora(target_modules=r".*no_such.*"), "no_such"),
        (lora(bias="lora_only"), "bias"),
        (lora(lora_bias=True), "lora_bias"),
        (lora(init_lora_weights="pissa"), "pissa"),
        (lora(init_lora_weights="olora"), "olora"),
        (lora(trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (lora(layer_replication=[(0, 2)]), "layer_replication"),
        (PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PrefixTuningConfig"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_a_member_is_refused_and_the_model_is_left_alone(config, named):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError) as caught:
        LoraEnsemble.from_base(model, 2, config)
    assert named in str(caught.value)
    assert caught.value.hint
    assert {name for name, _ in model.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    LoraEnsemble.from_base(model, 2, lora())  # and can still be made an ensemble of


def test_a_refused_target_names_those_that_there_are():
    with pytest.raises(ConfigError) as caught:
        LoraEnsemble.from_base(tiny_model(), 2, lora(target_modules=["c_attn"]))
    for name in ("q_proj", "down_proj", "all-linear"):
        assert name in str(caught.value)


@pytest.mark.parametrize("number", [0, -1])
def test_an_ensemble_of_nobody_is_refused(number):
    with pytest.raises(ConfigError, match="num_members"):
        LoraEnsemble.from_base(tiny_model(), number, lora())


def test_a_model_whose_logits_we_do_not_know_is_refused():
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.weight.data.mul_(50)
    plain = model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = forward
    with pytest.raises(ConfigError, match="does something to its hidden states or logits"):
        LoraEnsemble.from_base(model, 2, lora())


def test_adapters_that_an_ensemble_cannot_hold_are_refused_from_disk(tmp_path):
    get_peft_model(tiny_model(), lora(use_dora=True)).save_pretrained(tmp_path / "dora")
    refused([tmp_path / "dora"], "use_dora", str(tmp_path / "dora"), error=ConfigError)


# A save that fails


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_save_that_fails_leaves_the_earlier_ensemble(saved, monkeypatch, fails_at):
    before = contents(saved)
    ensemble = scatter_members(LoraEnsemble.load(saved, base=tiny_model()), seed=5)
    write = adapters.write_adapter

    def full(folder, adapter):
        if folder.name == f"member_{fails_at}":
            raise OSError(28, "No space left on device")
        write(folder, adapter)

    monkeypatch.setattr(adapters, "write_adapter", full)
    with pytest.raises(SaveError) as caught:
        ensemble.save(saved)
    assert "No space left on device" in str(caught.value)
    assert str(saved) in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert contents(saved) == before
    assert not (saved / ".partial").exists()
    monkeypatch.undo()
    ensemble.save(saved)
    assert torch.equal(scores(LoraEnsemble.load(saved, base=tiny_model()).eval()), scores(ensemble.eval()))


def test_a_first_save_that_fails_leaves_no_ensemble(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "write_adapter", full)
    with pytest.raises(SaveError):
        tiny_ensemble().save(tmp_path / "new")
    assert contents(tmp_path / "new") == {}


def test_a_save_cut_off_before_the_last_move_is_no_ensemble(saved, monkeypatch):
    """`ensemble.json` goes first and comes last: a crash in between can never pass for an ensemble."""
    replace = storage.os.replace

    def crash(source, target):
        if Path(target).name == "member_1":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        scatter_members(LoraEnsemble.load(saved, base=tiny_model()), seed=5).save(saved)
    monkeypatch.undo()
    refused(saved, "there is no ensemble.json")
    LoraEnsemble.load([saved / "member_0"], base=tiny_model())
    tiny_ensemble(3).save(saved)  # what is left over is in nobody's way
    assert not (saved / ".partial").exists()


def test_other_files_of_the_folder_stay(saved):
    for name in ("metrics.jsonl", "member_notes.txt", "member_photos/a.txt"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("mine")
    ensemble = LoraEnsemble.load(saved, base=tiny_model())
    ensemble.drop_member(2)
    ensemble.save(saved)
    for name in ("metrics.jsonl", "member_notes.txt", "member_photos/a.txt"):
        assert (saved / name).read_text() == "mine"
    assert not (saved / "member_2").exists()


def test_members_are_plain_peft_adapters(saved):
    """No field or file that PEFT or vLLM would not know; the base model is left to the caller."""
    for member in range(3):
        config = LoraConfig.from_pretrained(str(saved / f"member_{member}"))
        assert (config.r, config.lora_alpha, config.inference_mode) == (4, 8, True)
        assert not config.modules_to_save
        assert not config.use_dora
        model = PeftModel.from_pretrained(tiny_model(), str(saved / f"member_{member}"))
        assert isinstance(model.base_model, LoraModel)


# A folder says where its members are, and cannot say that they are elsewhere


def edited(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / "ensemble.json").read_text())
    (folder / "ensemble.json").write_text(json.dumps({**manifest, **fields}))


@pytest.mark.parametrize("name", ["../elsewhere", "..", ".", "", "a/b", "/tmp", "a\\b"])
def test_a_member_outside_the_folder_is_refused(saved, name):
    shutil.copytree(saved / "member_0", saved.parent / "elsewhere")
    edited(saved, members=[name], weights=[1.0])
    refused(saved, "ensemble.json", "leads out of the folder")


def test_a_member_named_twice_or_a_link_is_refused(saved, tmp_path):
    edited(saved, members=["member_0", "member_0"], weights=[0.5, 0.5])
    refused(saved, "named twice")
    shutil.move(saved / "member_1", tmp_path / "elsewhere")
    (saved / "member_1").symlink_to(tmp_path / "elsewhere")
    edited(saved, members=["member_0", "member_1"])
    refused(saved, "member_1, which is a link")


def test_a_base_that_looks_like_an_option_is_refused(saved):
    edited(saved, base_model="--download-dir=/tmp")
    refused(saved, "ensemble.json", "option")


@pytest.mark.parametrize("members", [3, 6, 7])
def test_mixture_weights_sum_to_one_in_any_precision(tmp_path, members):
    ensemble = tiny_ensemble(members).to(torch.bfloat16)
    assert ensemble.dtype == torch.bfloat16
    assert torch.equal(ensemble.weights, torch.full((members,), 1 / members))
    ensemble.save(tmp_path / "new")
    loaded = LoraEnsemble.load(tmp_path / "new", base=tiny_model())
    torch.testing.assert_close(loaded.weights, ensemble.weights)
    # Folders of earlier versions hold weights as bfloat16 rounds them.
    edited(tmp_path / "new", weights=torch.full((members,), 1 / members).bfloat16().tolist())
    torch.testing.assert_close(LoraEnsemble.load(tmp_path / "new", base=tiny_model()).weights.sum(), torch.tensor(1.0))


def test_adapters_of_two_bases_are_no_ensemble(saved):
    for member, base in enumerate(["somebody/one", "somebody/two", "somebody/one"]):
        file = saved / f"member_{member}" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    for path in (saved, [saved / "member_0", saved / "member_1"]):
        refused(path, "somebody/two", "somebody/one", "member_1/adapter_config.json")
    assert LoraEnsemble.load([saved / "member_0", saved / "member_2"], base=tiny_model()).num_members == 2


def test_the_folder_of_one_peft_adapter_is_an_ensemble_of_one(tmp_path):
    get_peft_model(tiny_model(), lora(init_lora_weights=False)).save_pretrained(tmp_path)
    one, listed = (LoraEnsemble.load(path, base=tiny_model()) for path in (tmp_path, [tmp_path]))
    assert one.num_members == 1
    assert torch.equal(scores(one), scores(listed))


def test_a_save_takes_away_nothing_but_the_ensemble_that_was_there(saved):
    for name in ("member_7", "member_0.bak"):
        (saved / name).mkdir()
        (saved / name / "thesis.tex").write_text("mine")
    tiny_ensemble(2).save(saved)
    assert sorted(p.name for p in saved.iterdir()) == [
        "ensemble.json",
        "member_0",
        "member_0.bak",
        "member_1",
        "member_7",
    ]
    before = contents(saved)
    with pytest.raises(SaveError, match="member_7"):
        tiny_ensemble(8).save(saved)
    assert contents(saved) == before


def test_two_writers_do_not_meet(saved):
    """The second waits for the first: whoever comes last is there, whole."""
    members = [tiny_ensemble(m) for m in (2, 4)]
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(ensemble.save, saved) for ensemble in members * 3]:
            future.result()
    loaded = LoraEnsemble.load(saved, base=tiny_model())
    assert loaded.num_members in (2, 4)
    assert torch.equal(scores(loaded), scores(tiny_ensemble(loaded.num_members)))
    assert not (saved / ".partial").exists()


def test_of_a_hub_id_only_what_an_ensemble_is_made_of_is_downloaded(saved, monkeypatch):
    files = [
        "ensemble.json", "member_0/adapter_config.json", "member_0/adapter_model.safetensors", "tokenizer.json",
        "reference/member_1/adapter_model.safetensors", "preference.json", "model.safetensors", "training.png",
        "checkpoint-5/ensemble.json", "checkpoint-5/member_0/adapter_model.safetensors", "checkpoint-5/optimizer.pt",
    ]  # fmt: skip
    asked = {}
    monkeypatch.setattr(storage, "snapshot_download", lambda name, **patterns: asked.update(patterns) or str(saved))
    LoraEnsemble.load("somebody/ensemble", base=tiny_model())
    assert list(filter_repo_objects(files, **asked)) == files[:6]


def test_a_base_with_code_of_its_own_is_never_run(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever would ask
    with pytest.raises(EnsembleFormatError, match="could not be loaded"):
        LoraEnsemble.from_base(tmp_path, 2, lora())


# Folders of earlier versions


def test_a_folder_of_an_earlier_version_loads_and_resumes(tmp_path):
    """Written by hand as 0.1 wrote it before members had kinds."""
    ensemble = tiny_ensemble(2)
    for member in range(2):
        folder = tmp_path / f"member_{member}"
        folder.mkdir()
        lora(inference_mode=True, target_modules=sorted(ensemble.peft_config.target_modules)).save_pretrained(folder)
        tensors = {}
        for name, (lora_a, lora_b) in ensemble.adapter(member).items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a.detach().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b.detach().contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "ensemble.json").write_text(
        '{"base_model": "", "members": ["member_0", "member_1"], "weights": [0.25, 0.75], "alpha": 0.8,'
        ' "routing_quantity": "sequence", "renyi_version": "0.0.9", "format_version": 1}'
    )
    loaded = LoraEnsemble.load(tmp_path, base=tiny_model())
    assert torch.equal(scores(loaded), scores(ensemble))
    assert loaded.weights.tolist() == [0.25, 0.75]
    resumed = tiny_ensemble(2, scattered=False)
    resumed.restore(tmp_path)
    assert torch.equal(scores(resumed), scores(ensemble))
    resumed.save(tmp_path)
    assert torch.equal(scores(LoraEnsemble.load(tmp_path, base=tiny_model())), scores(ensemble))


def test_the_targets_of_an_adapter_are_written_in_order(tmp_path):
    """PEFT holds them as a set. Its order changes with the hash of strings, so with every process."""
    tiny_ensemble(2, target_modules=["v_proj", "q_proj", "up_proj", "down_proj", "k_proj"]).save(tmp_path)
    kept = json.loads((tmp_path / "member_0" / "adapter_config.json").read_text(encoding="utf-8"))
    assert kept["target_modules"] == ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
