"""A language small enough to write down: a model of a few words, every sequence there is, and what each is worth.

Token 0 ends a sequence, and any other is an ordinary word. A sequence ends with its 0 or is cut off at `max_length`, so
that the probabilities of all of them sum to exactly 1 under any model. Nothing here asserts anything.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

EOS = 0
PADDING = -1


def tiny_llama(vocab_size: int = 5, seed: int = 0, initializer_range: float = 0.3) -> LlamaForCausalLM:
    """A random float32 model of 2 layers and 32 features in evaluation mode, whose next tokens are far from uniform.

    There is no token for padding: every token is one that the model may choose. Pad with `EOS`, and mask it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=initializer_range,
                bos_token_id=None,
                eos_token_id=EOS,
                pad_token_id=None,
                tie_word_embeddings=False,
            )
        )
    model.generation_config.pad_token_id = EOS
    return model.eval()


def enumerate_sequences(vocab_size: int = 5, max_length: int = 4, eos: int = EOS) -> tuple[Tensor, Tensor]:
    """Every sequence that ends with `eos` within `max_length` tokens, and every other of `max_length`, in order.

    Returns:
        The sequences [S, L], long, −1 after the end, and their numbers of tokens [S], the end counted.
    """
    every = torch.cartesian_prod(*[torch.arange(vocab_size)] * max_length).view(-1, max_length)
    ended = (every == eos).cumsum(dim=1)
    # What follows the first end is padding; each sequence so cut occurs once for every continuation.
    sequences = every.masked_fill((ended - (every == eos).long()) > 0, PADDING).unique(dim=0)
    return sequences, (sequences != PADDING).sum(dim=1)


def sequence_log_probs(model: PreTrainedModel, prompt_ids: Tensor, sequences: Tensor) -> Tensor:
    """log p(y_t | prompt, y_<t) [S, L], float64, in nats, 0 at padding; the sum over L is a sequence's log-likelihood.

    With its graph, unless under `torch.no_grad`.

    Args:
        model: any causal language model.
        prompt_ids: [P], at least one token.
        sequences: [S, L], padded with −1, as `enumerate_sequences` gives them.
    """
    S, L = sequences.shape
    real = sequences != PADDING
    read = sequences.masked_fill(~real, EOS)  # on the right of everything counted, where nothing attends to it
    rows = torch.cat([prompt_ids.expand(S, -1), read], dim=1)
    logits = model(input_ids=rows.to(model.device)).logits.cpu().double()
    # Rows with one beginning may get values for it that differ in their last digits. The first row speaks for all, or
    # the probabilities of what follows a beginning would not sum to exactly 1.
    steps = []
    for t in range(L):
        length = len(prompt_ids) + t
        _, beginning = rows[:, :length].unique(dim=0, return_inverse=True)
        first = torch.full((S,), S).scatter_reduce(0, beginning, torch.arange(S), "amin")[beginning]
        steps.append(logits[first, length - 1].log_softmax(dim=-1).gather(1, read[:, t : t + 1]))
    return torch.cat(steps, dim=1) * real
