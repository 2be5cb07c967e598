"""The label of a token that is not trained. It is the same number as in transformers.

Read next: `data/prepare.py`, which sets the labels, and `ensemble/joint.py`, which skips tokens with this label.
"""

IGNORED = -100
