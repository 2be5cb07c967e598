"""The learning rate of the members' spreads. Read next: `renyi.members.gaussian`, a kind of member with spreads."""

from torch.optim import Optimizer

from renyi.ensemble import LoraEnsemble


def give_spreads_a_rate(optimizer: Optimizer, ensemble: LoraEnsemble, rate: float) -> None:
    """Put the members' spreads, if they have any, into a group of their own, with their own rate and no decay.

    Args:
        optimizer: newly made, over all trained parameters of the ensemble.
        ensemble: the members.
        rate: learning rate of the logarithms of the spreads.
    """
    names = ensemble.stack.spread_names
    spreads = {p: None for name, p in ensemble.named_parameters() if name.rpartition(".")[2] in names}
    if not spreads:
        return
    first = optimizer.param_groups[0]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in spreads]
    optimizer.add_param_group({**first, "params": list(spreads), "weight_decay": 0.0, "lr": rate})
