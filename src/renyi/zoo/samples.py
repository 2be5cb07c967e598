"""A few hundred example rows of each kind that trainers read, drawn from the zoo's worlds.

`renyi init` writes them, so that its settings run before a user has put in data of their own. The zoo's base model
knows their words.
"""

from typing import Any

from renyi.data import PairPreparation, PromptPreparation, RatedPreparation, RowPreparation, ThumbPreparation
from renyi.zoo.half_known import HalfKnown
from renyi.zoo.preferences import PreferenceWorld
from renyi.zoo.world import World

NUM_ROWS = 240


def sample_rows(kind: type[RowPreparation]) -> list[dict[str, Any]]:
    """Rows for a trainer: chats, pairs for one that reads pairs, and so on for thumbs and prompts.

    Args:
        kind: the trainer's `preparation_class`.
    """
    if issubclass(kind, (PairPreparation, RatedPreparation)):
        return PreferenceWorld().dataset(NUM_ROWS).to_list()
    if issubclass(kind, ThumbPreparation):
        return PreferenceWorld().thumbs(NUM_ROWS).to_list()
    if issubclass(kind, PromptPreparation):
        asked = [question.prompt for question in HalfKnown().questions()]
        return [{"prompt": prompt} for prompt in asked[:NUM_ROWS]]
    return World().dataset(NUM_ROWS).to_list()
