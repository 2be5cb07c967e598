"""The label of a token that is not trained, as everywhere in transformers.

Rows are labelled in `renyi.data.prepare`, and the joint forward in `renyi.ensemble.joint` skips what is ignored.
"""

IGNORED = -100
