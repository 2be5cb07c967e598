"""The files of an ensemble's folder: their names and the version of their layout, in one place.

    OUT/ensemble.json                        what is in the folder; written last, removed first
    OUT/member_0/adapter_config.json         an ordinary PEFT adapter, and so on for every member
    OUT/member_0/adapter_model.safetensors
    OUT/member_0/distribution.safetensors    what a member has beside its mean, if it is a distribution
    OUT/preference.json, OUT/reference/      what margins are measured against, after training on preferences
    OUT/abstention.json                      the uncertainty above which answers are not trusted, after a search for it

Other rooms add files of their own and say so beside the code that writes them. `ensemble/storage.py` reads and writes
the folder.
"""

FORMAT_VERSION = 1

MANIFEST_FILE = "ensemble.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
DISTRIBUTION_FILE = "distribution.safetensors"
PREFERENCE_FILE = "preference.json"
REFERENCE_FOLDER = "reference"
ABSTENTION_FILE = "abstention.json"

# What is fetched of an ensemble on the hub: a run's checkpoints and anything else are left there.
HUB_FILES = [
    *(f"*{name}" for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, DISTRIBUTION_FILE)),
    "*.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.jinja",
]


def member_name(member: int) -> str:
    """The folder of one member inside an ensemble's."""
    return f"member_{member}"
