"""Equalities that the tests hold on a CPU, for any device and precision: `gpu.py` asks a GPU for them.

Each check gives three tensors of one quantity: ours, a peer's on the same device in the same precision, and the exact
one, computed by the peer in float64 on the CPU. Ours should be about as close to the exact one as the peer's is. The
models, the rows and the enumeration are those of the tests.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from renyi import LoraEnsemble
from renyi.ensemble.head import LogitTransform, token_scores

sys.path.append(str(Path(__file__).parents[1] / "tests"))
sys.path.append(str(Path(__file__).parents[1] / "tests/ensemble"))
from float64 import in_float64
from test_decode import VOCABULARY, WEIGHTS, enumerable, forced
from tiny import padded_batch, quiet, text_rows, tiny_ensemble, tiny_model, tiny_tokenizer, trainer_of


class Case(NamedTuple):
    """One quantity, computed three times."""

    what: str
    ours: Tensor
    peer: Tensor
    exact: Tensor

    def errors(self) -> tuple[float, float]:
        """Ours and the peer's: ‖x − exact‖ / ‖exact‖."""
        ours, peer, exact = (x.detach().cpu().double().flatten() for x in (self.ours, self.peer, self.exact))
        return float((ours - exact).norm() / exact.norm()), float((peer - exact).norm() / exact.norm())


def every_case(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for kind in ("llama", "gemma2"):
        yield from joint_forward(device, dtype, kind)
    yield from head(device, dtype)
    yield decoding(device, dtype)
    yield one_member_is_trl(device, dtype)
    yield from routed_is_dense(device, dtype)


def joint_forward(device: str, dtype: torch.dtype, kind: str = "llama", backend: str | None = None) -> Iterator[Case]:
    """Log-likelihoods of all members and the gradient of an uneven sum; the peer is PEFT, one member after another.

    With a `backend` our blocks are compiled, and the peer is the joint forward as it is.
    """
    ids, mask = padded_batch()
    share_MB = torch.linspace(0.5, 1.5, 9).view(3, 3)

    def joint(ensemble: LoraEnsemble) -> tuple[Tensor, Tensor]:
        ell_MBT = ensemble.token_log_likelihood(ids.to(device), mask.to(device))
        (ell_MBT.sum(-1) * share_MB.to(device)).sum().backward()
        return ell_MBT[..., 1:], torch.cat([x.grad[m].flatten() for m in range(3) for x in _matrices(ensemble)])

    def one_by_one(members: Sequence[PeftModel]) -> tuple[Tensor, Tensor]:
        """The same, without the joint forward and without our head."""
        ell, gradient = [], []
        for model, share_B in zip(members, share_MB, strict=True):
            batch, real = ids.to(model.device), mask.to(model.device)
            logits = model(input_ids=batch, attention_mask=real).logits[:, :-1]
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            ell.append(log_p.gather(-1, batch[:, 1:, None])[..., 0].masked_fill(real[:, 1:] == 0, 0.0))
            (ell[-1].sum(-1) * share_B.to(ell[-1])).sum().backward()
            gradient += [x.grad.flatten() for x in _adapter(model)]
        return torch.stack(ell), torch.cat(gradient)

    ensemble = tiny_ensemble(3, kind)
    members = _peft(ensemble, partial(tiny_model, kind))
    with in_float64():
        exact = one_by_one([deepcopy(model).double() for model in members])
    name = f"joint forward of {kind}"
    if backend is None:
        peer = one_by_one([_cast(model, device, dtype) for model in members])
    else:
        name += ", compiled"
        peer = joint(_cast(deepcopy(ensemble), device, dtype))
        ensemble.compile(backend=backend)
    ours = joint(_cast(ensemble, device, dtype))
    yield Case(f"{name}: log-likelihoods", ours[0], peer[0], exact[0])
    yield Case(f"{name}: gradients", ours[1], peer[1], exact[1])


def head(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Log-likelihoods under a frozen head of several blocks, and the rows' gradient; the peer raises its logits."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 64, generator=draw), torch.randn(20_000, 64, generator=draw) / 4
    targets, upstream = torch.randint(20_000, (64,), generator=draw), torch.rand(64, generator=draw)

    def plain(rows: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        logits = head(rows)
        return -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")

    def blocked(rows: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        return token_scores(rows, head, targets, LogitTransform()).log_probs

    def run(log_likelihood: Callable[..., Tensor], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        head = nn.Linear(64, 20_000, bias=False).requires_grad_(False)
        head.weight.data = weight.to(device, dtype)
        rows = hidden.to(device, dtype, copy=True).requires_grad_()
        ell = log_likelihood(rows, head, targets.to(device))
        (ell * upstream.to(ell)).sum().backward()
        return ell, rows.grad

    found = [run(blocked, device, dtype), run(plain, device, dtype), run(plain, "cpu", torch.float64)]
    for what, values in zip(("log-likelihoods", "gradient"), zip(*found, strict=True), strict=True):
        yield Case(f"head: {what}", *values)


def decoding(device: str, dtype: torch.dtype) -> Case:
    """log p of each of the 5⁴ answers under the mixture, token by token; the peer scores whole answers with PEFT."""
    ensemble = enumerable()
    answers = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * 4)
    prompts = torch.tensor([[1, 3]]).expand(len(answers), -1)
    members = _peft(ensemble, partial(tiny_model, vocab_size=VOCABULARY, pad_token_id=None, eos_token_id=None))

    def whole(members: Sequence[PeftModel]) -> Tensor:
        log_p = []
        for model, weight in zip(members, WEIGHTS, strict=True):
            batch = torch.cat([prompts, answers], dim=1).to(model.device)
            with torch.no_grad():
                logits = model(input_ids=batch).logits[:, 1:-1].double()
            taken = logits.log_softmax(-1).gather(-1, batch[:, 2:, None])
            log_p.append(weight.log() + taken.sum((1, 2)).cpu())
        return torch.stack(log_p).logsumexp(0)

    with in_float64():
        exact = whole([deepcopy(model).double() for model in members])
    peer = whole([_cast(model, device, dtype) for model in members])
    generation, _ = forced(_cast(ensemble, device, dtype), prompts.to(device), answers.to(device))
    return Case("decoding: the mixture, enumerated", generation.log_prob.sum(-1), peer, exact)


# Gradient descent: Adam divides by small numbers, and so turns rounding into steps. With bfloat16 it is autocast.
def _run(device: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "use_cpu": device == "cpu",
        "bf16": dtype == torch.bfloat16,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_steps": 4,
    }


def one_member_is_trl(device: str, dtype: torch.dtype) -> Case:
    """What four steps change, M = 1, α = 0.8; the peer is TRL's trainer from the same start."""
    (start,) = _peft(tiny_ensemble(1), tiny_model)
    first = _vector(_adapter(start))

    def trl(model: PeftModel, device: str, dtype: torch.dtype) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            settings = SFTConfig(folder, **quiet(_run(device, dtype)))
            SFTTrainer(model, settings, train_dataset=text_rows(), processing_class=tiny_tokenizer()).train()
        return _vector(_adapter(model)) - first

    with in_float64():
        exact = trl(deepcopy(start).double(), "cpu", torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, model=tiny_ensemble(1), num_members=1, alpha=0.8, **_run(device, dtype))
        trainer.train()
    ours = _vector([x[0] for x in _matrices(trainer.model)]) - first
    return Case("training: M = 1 against TRL", ours, trl(start, device, dtype), exact)


def routed_is_dense(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """What four steps change, M = 3, α = 0.7: a threshold of nothing, batches in parts; the peer is the plain step."""
    first = _vector(_matrices(tiny_ensemble()))

    def train(ensemble: LoraEnsemble, device: str, dtype: torch.dtype, **settings: Any) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            given = {"num_members": 3, "alpha": 0.7, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0}
            trainer = trainer_of(folder, model=ensemble, **given, **_run(device, dtype), **settings)
            trainer.train()
        return _vector(_matrices(trainer.model)) - first

    start = tiny_ensemble().double()  # drawn in float32, as the others are
    with in_float64():
        exact = train(start, "cpu", torch.float64)
    peer = train(tiny_ensemble(), device, dtype)
    sparse = train(tiny_ensemble(), device, dtype, routing="sparse", routing_threshold=1e-30)
    yield Case("training: sparse, nothing left out, against dense", sparse, peer, exact)
    parts = train(tiny_ensemble(), device, dtype, token_budget=60)
    yield Case("training: a step in parts against one", parts, peer, exact)


def _peft(ensemble: LoraEnsemble, base: Callable[[], PreTrainedModel]) -> list[PeftModel]:
    """The members as PEFT loads them, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        ensemble.save(folder)
        folders = [f"{folder}/member_{m}" for m in range(ensemble.num_members)]
        return [PeftModel.from_pretrained(base(), each, is_trainable=True).eval() for each in folders]


def _cast(model: Any, device: str, dtype: torch.dtype) -> Any:
    """Parameters in another precision. Buffers stay: in a loaded model the frequencies of positions are float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device)


def _matrices(ensemble: LoraEnsemble) -> list[Tensor]:
    return [x for pair in ensemble.stack.matrices().values() for x in pair]


def _adapter(model: PeftModel) -> list[Tensor]:
    """In the order of `_matrices`, which is that of the modules."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def _vector(matrices: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().cpu().double().flatten() for x in matrices])
