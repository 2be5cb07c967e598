"""A world that a model half knows. Half of the statements that it is trained on are right, the others are guesses.

The most frequent answer to nearly every question is the right one. So a vote of samples is right where one sample is
right half of the time. A method that sharpens a model without labels should make one sample as right as the vote.

On a "garden path" a right answer begins with the value, and a guess begins with other words. To "home of mira ?" four
in ten answers are "oslo .", and six in ten are "from …" with one of several other towns. "from" is the likelier first
word, but no answer that begins with it is as likely as "oslo .". Sharpening token by token, as a temperature does,
makes guesses more likely. Sharpening whole answers makes them less likely.

Probabilities of answers are enumerated, not sampled. Read next: `world.py`, the facts and forms of questions.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from renyi.ensemble import LoraEnsemble
from renyi.errors import ConfigError
from renyi.training import RenyiSFTConfig, RenyiSFTTrainer
from renyi.zoo.base import load_base
from renyi.zoo.world import FORMS, NUM_FORMS, VALUES, Fact, Message, World

STATEMENTS, STATEMENTS_PER_STEP, STEPS = 25_600, 128, 400
_CLIPPED, _HEADLINE = 1, 2  # of an attribute's forms: "from oslo ." and "oslo ."
_TEMPERATURES = (0.02, 10.0)


@dataclass(frozen=True)
class HalfKnown:
    """Statements about facts that are right or are guesses. The same arguments always give the same statements.

    Args:
        right: share of the statements that are right, strictly between 0 and 1.
        guesses: how many wrong values of a fact are guessed, equally often; at most 9.
        garden_path: whether guesses begin with words that right answers do not have. If not, all answers to a question
            have the same wording, and they differ first in the value.
        num_facts: as in a `World`; each can be asked in `NUM_FORMS` forms.
        seed: which draw of the facts and their guesses.

    Raises:
        ConfigError: an argument is out of its range (it is also a ValueError).
    """

    right: float = 0.5
    guesses: int = 4
    garden_path: bool = False
    num_facts: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.right < 1:
            raise ConfigError(f"right must be a share strictly between 0 and 1, not {self.right}")
        most = min(map(len, VALUES.values())) - 1
        if not 1 <= self.guesses <= most:
            raise ConfigError(f"guesses must be from 1 to {most}, not {self.guesses}")

    def questions(self) -> list["Question"]:
        """Every fact in every form of question, a fact's forms one after another."""
        world = World(num_facts=self.num_facts, contested=0.0, num_sources=1, statements=1, seed=self.seed)
        rng = random.Random(f"guesses {self.seed}")
        return [question for fact in world.facts for question in self._ask(fact, rng)]

    def dataset(self, num_statements: int, seed: int = 0) -> Dataset:
        """Statements as TRL's conversational data (`messages`): a question, and an answer that is right or a guess."""
        rng = random.Random(f"statements {self.seed} {seed}")
        questions = self.questions()

        def statement() -> dict[str, list[Message]]:
            question = rng.choice(questions)
            knows = rng.random() < self.right
            value = question.right if knows else rng.choice(question.guesses)
            wording = question.wordings[0 if knows else -1]
            return {"messages": [*question.prompt, {"role": "assistant", "content": wording[value]}]}

        return Dataset.from_list([statement() for _ in range(num_statements)])

    def _ask(self, fact: Fact, rng: random.Random) -> list["Question"]:
        forms, values = FORMS[fact.attribute], VALUES[fact.attribute]
        right = values.index(fact.values[0])
        guesses = tuple(rng.sample([v for v in range(len(values)) if v != right], self.guesses))
        asked = []
        for form in range(NUM_FORMS):
            worded = (_HEADLINE, _CLIPPED) if self.garden_path else (form,)
            wordings = tuple(tuple(forms[i].answer(fact.person, value) for value in values) for i in worded)
            prompt = [{"role": "user", "content": forms[form].ask(fact.person)}]
            asked.append(Question(prompt, wordings, right, guesses))
        return asked


class Question(NamedTuple):
    """A question and its possible answers.

    Attributes:
        prompt: as messages.
        wordings: an answer for each of A values, [W][A]: first in the wording of right answers, last of guesses. In
            this world A is 10.
        right: index of the right value.
        guesses: indices of the values that are guessed.
    """

    prompt: list[Message]
    wordings: tuple[tuple[str, ...], ...]
    right: int
    guesses: tuple[int, ...]


def train_half_known(
    world: HalfKnown, output_dir: Path, seed: int = 0, **overrides: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The zoo's base after training on the world's statements, as a plain model, and its tokenizer.

    Args:
        world: gives the statements.
        output_dir: a folder for the trainer.
        seed: of the statements and the training.
        overrides: other training settings, as in `RenyiSFTConfig`.
    """
    base, tokenizer = load_base()
    settings: dict[str, Any] = {
        "num_members": 1,
        "alpha": 0.0,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": STATEMENTS_PER_STEP,
        "max_steps": STEPS,
        "assistant_only_loss": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        **overrides,
    }
    trainer = RenyiSFTTrainer(
        base,
        RenyiSFTConfig(str(output_dir), **settings),
        train_dataset=world.dataset(STATEMENTS, seed),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=tokenizer,
    )
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    trainer.train()
    return trainer.model.merged(0).eval(), tokenizer


class Answers(NamedTuple):
    """A model's logits for every answer to Q questions: W wordings of 10 values, of at most L tokens.

    Attributes:
        logits: [Q, W, 10, L, V], for each token of an answer and for the end after it.
        tokens: [Q, W, 10, L], these tokens; −1 as padding.
    """

    logits: Tensor
    tokens: Tensor

    def log_likelihood(self, temperature: float = 1.0) -> Tensor:
        """log p of whole answers, each token at a temperature: [Q, W, 10], float64, nats."""
        log_p = (self.logits.double() / temperature).log_softmax(dim=-1)
        of_token = log_p.gather(-1, self.tokens.clamp(min=0)[..., None])[..., 0]
        return (of_token * (self.tokens >= 0)).sum(dim=-1)

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """Probability of each value in any wording, and of everything else together: [Q, 11], float64."""
        of_value = self.log_likelihood(temperature).exp().sum(dim=1)
        return torch.cat([of_value, (1 - of_value.sum(dim=1, keepdim=True)).clamp(min=0)], dim=1)


def temperature_at(entropy: float, probabilities: Callable[[float], Tensor]) -> float:
    """The temperature at which answers have that entropy in nats, on average over the questions.

    The entropy rises with the temperature until text that is not an answer outweighs the answers. The temperature is
    below that point. If no temperature has the entropy, it is the one that comes nearest.

    Args:
        entropy: nats.
        probabilities: gives those of the answers and of everything else, [Q, A + 1], at a temperature.
    """

    def at(log_temperature: float) -> float:
        return answer_entropy(probabilities(math.exp(log_temperature))).mean().item()

    low, high = (math.log(temperature) for temperature in _TEMPERATURES)
    peak = minimize_scalar(lambda x: -at(x), bounds=(low, high), method="bounded").x
    if not at(low) < entropy < at(peak):
        return math.exp(peak if entropy >= at(peak) else low)
    return math.exp(brentq(lambda x: at(x) - entropy, low, peak, xtol=1e-6))


@torch.no_grad()
def read_answers(ensemble: LoraEnsemble, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> Answers:
    """Read every answer to every question with an ensemble's one member, or with the base if none is in use."""
    prompts = tokenizer.apply_chat_template(
        [question.prompt for question in questions], add_generation_prompt=True, tokenize=False
    )
    texts = [
        [f"{prompt}{answer}{tokenizer.eos_token}" for wording in question.wordings for answer in wording]
        for prompt, question in zip(prompts, questions, strict=True)
    ]
    batch = tokenizer([t for of_question in texts for t in of_question], add_special_tokens=False, padding=True,
                      padding_side="right", return_tensors="pt")  # fmt: skip
    asked = torch.tensor([len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]])
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    start = asked.repeat_interleave(len(texts[0]))
    longest = int((attention_mask.sum(dim=1) - start).max())
    at = start[:, None] + torch.arange(longest)
    is_answer = at < attention_mask.sum(dim=1, keepdim=True)
    at = at.clamp(max=input_ids.shape[1] - 1)
    tokens = torch.where(is_answer, input_ids.gather(1, at), -1)
    (logits,) = ensemble.eval().logits(input_ids, attention_mask)
    logits = logits.gather(1, (at - 1)[..., None].expand(-1, -1, logits.shape[-1]))
    shape = (len(questions), len(questions[0].wordings), -1, longest)
    return Answers(logits.view(*shape, logits.shape[-1]), tokens.view(shape))


class AnswerQuality(NamedTuple):
    """Means over questions, from exact probabilities of the answers.

    Attributes:
        accuracy: probability that one sample is right.
        right: that probability for each question.
        likeliest: share of the questions whose likeliest value is right: the vote of infinitely many samples.
        entropy: of the answer, nats.
        distinct: expected number of different answers among `samples`.
        other: probability of text that is not an answer. `entropy` and `distinct` count it as one more answer; it does
            not vote.
    """

    accuracy: float
    right: list[float]
    likeliest: float
    entropy: float
    distinct: float
    other: float


def answer_quality(probabilities: Tensor, questions: Sequence[Question], samples: int = 16) -> AnswerQuality:
    """How right and how varied answers with these probabilities [Q, A + 1] are; the last is of everything else."""
    truth = torch.tensor([question.right for question in questions])
    right = probabilities.gather(1, truth[:, None])[:, 0]
    return AnswerQuality(
        accuracy=right.mean().item(),
        right=right.tolist(),
        likeliest=(probabilities[:, :-1].argmax(dim=1) == truth).double().mean().item(),
        entropy=answer_entropy(probabilities).mean().item(),
        distinct=(1 - (1 - probabilities).clamp(min=0) ** samples).sum(dim=1).mean().item(),
        other=probabilities[:, -1].mean().item(),
    )


def answer_entropy(probabilities: Tensor) -> Tensor:
    """Entropy [Q] of answers with probabilities [Q, A + 1], in nats."""
    return torch.special.entr(probabilities).sum(dim=1)
