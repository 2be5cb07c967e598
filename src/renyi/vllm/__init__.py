"""The mixture of an ensemble's members inside vLLM, which runs them as LoRA adapters.

A request to the ensemble is a group of M requests to vLLM, one for each member, with the same prompt, settings and
seed. A logits processor writes the mixture to the group's rows, so that all of them draw the same token. A scheduler
runs the rows of a group together, or ends the group with an error. `SERVE_FLAGS` turn this on in `vllm serve`.

This package lives in vLLM's environment. It needs torch and `renyi` without its dependencies. Read in this order:
`groups.py` (what a request says about its group), `mixing.py` (the mixture), `admission.py` (which groups may run),
`records.py` (how the uncertainty leaves vLLM), `processor.py` and `scheduler.py` (what vLLM calls).
"""

PROCESSOR, SCHEDULER = "renyi.vllm.processor:MixtureProcessor", "renyi.vllm.scheduler.WholeGroups"
SERVE_FLAGS = (
    *("--logits-processors", PROCESSOR, "--scheduler-cls", SCHEDULER),
    *("--no-async-scheduling", "--no-enable-chunked-prefill"),  # a group's rows would not be kept together
)
