"""The algorithm on one page: train an ensemble on contradictory records with the core of the library alone.

    python examples/loop.py

It has no trainer and no TRL: a joint forward, the Rényi loss, an optimizer. `RenyiSFTTrainer` computes the same, and
adds datasets, evaluation, checkpoints and logging.
"""

import torch
from peft import LoraConfig

from renyi import LoraEnsemble
from renyi.objectives import effective_members, jensen_gap, renyi_loss, responsibilities
from renyi.zoo import World, load_base

NUM_MEMBERS, ALPHA = 2, 0.8
STEPS, BATCH, LEARNING_RATE = 300, 32, 3e-3
HOLD, RAMP = 0.2, 0.2  # shares of training: alpha stays at 0, then rises


def batches(world: World, tokenizer, steps: int, seed: int):
    """Endless unlabelled records of two schools that contradict each other, as padded token ids and labels."""
    for step in range(steps):
        conversations = [record.messages for record in world.records(BATCH, seed=seed + step)]
        encoded = tokenizer.apply_chat_template(
            conversations,
            return_dict=True,
            return_assistant_tokens_mask=True,
            padding=True,
            return_tensors="pt",
        )
        trained = torch.as_tensor(encoded["assistant_masks"]).bool()
        labels = encoded["input_ids"].masked_fill(~trained, -100)  # questions are given, answers are learned
        yield {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": labels,
        }


def scheduled(step: int) -> float:
    """Alpha: 0 until members know what all records agree on; then it rises, and members part on the rest."""
    return ALPHA * min(1.0, max(0.0, (step / STEPS - HOLD) / RAMP))


def main() -> None:
    torch.manual_seed(0)
    world = World(seed=0)
    base, tokenizer = load_base()

    # Members differ only in their draws of A; every B is zero, so at step 0 they all agree.
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    ensemble = LoraEnsemble.from_base(base, NUM_MEMBERS, config, seed=0)
    ensemble.train()
    parameters = [p for p in ensemble.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)

    for step, batch in enumerate(batches(world, tokenizer, STEPS, seed=1)):
        # One pass of the base over members x examples rows: log p_m(y_i | x_i), in nats.
        log_likelihood = ensemble.log_likelihood(**batch)  # [M, B]
        alpha = scheduled(step)
        loss = renyi_loss(log_likelihood, alpha).sum() / (batch["labels"] != -100).sum()

        # Responsibilities sum to one over members; M times the loss gives each the learning rate it would have alone.
        (NUM_MEMBERS * loss).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()

        if step % 50 == 0 or step == STEPS - 1:
            shares = responsibilities(log_likelihood.detach(), alpha)  # [M, B]: who learns from which example
            gap = jensen_gap(log_likelihood.detach()).mean() / world.statements
            print(
                f"step {step:3d}  alpha {alpha:.2f}  loss {loss.item():.3f} nats/token  "
                f"Jensen gap {gap.item():.3f} nats/answer  "
                f"members per record {effective_members(shares).mean().item():.2f}"
            )

    # Which school does a member speak for? Nobody told it that there are two.
    records = world.records(200, seed=999)
    held_out = tokenizer.apply_chat_template(
        [record.messages for record in records], return_dict=True, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        ell = ensemble.log_likelihood(held_out["input_ids"], held_out["attention_mask"])
    best = ell.argmax(dim=0)
    for member in range(NUM_MEMBERS):
        sources = [record.source for record, m in zip(records, best.tolist(), strict=True) if m == member]
        share = sources.count(0) / max(len(sources), 1)
        print(f"member {member} explains {len(sources)} held-out records best; {share:.0%} are by the first school")


if __name__ == "__main__":
    main()
