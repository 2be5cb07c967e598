"""The names of the files in an ensemble's folder, and the version of the folder's layout.

    OUT/ensemble.json                        the list of members and their weights; written last, removed first
    OUT/member_0/adapter_config.json         an ordinary PEFT adapter, and so on for every member
    OUT/member_0/adapter_model.safetensors
    OUT/member_0/distribution.safetensors    a member's other tensors beside its mean, if it is a distribution
    OUT/preference.json, OUT/reference/      the loss and the reference of margins, after training on preferences
    OUT/thumbs.json                          the same after training on thumbs, with the members' reference points
    OUT/reward.json                          what each reward model's rewards are centred by, after training on rewards
    OUT/abstention.json                      the uncertainty above which answers are not trusted, if it was searched for

Other packages add more files. The code that writes such a file also names it. Read next: `ensemble/storage.py`, which
reads and writes the folder.
"""

FORMAT_VERSION = 1

MANIFEST_FILE = "ensemble.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
DISTRIBUTION_FILE = "distribution.safetensors"
PREFERENCE_FILE = "preference.json"
THUMBS_FILE = "thumbs.json"
REWARD_FILE = "reward.json"
REFERENCE_FOLDER = "reference"
ABSTENTION_FILE = "abstention.json"

# Only these files of an ensemble are downloaded from the hub. Checkpoints and other files are not.
HUB_FILES = [
    *(f"*{name}" for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, DISTRIBUTION_FILE)),
    "*.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.jinja",
]


def member_name(member: int) -> str:
    """The name of one member's folder inside the ensemble's folder."""
    return f"member_{member}"
