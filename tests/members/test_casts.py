"""Layers with the same input share its copy in half precision, within one forward."""

import torch

from renyi.members.layer import MemberSelection

HALF = torch.bfloat16


def test_an_input_is_cast_once_in_a_forward() -> None:
    selection, x, other = MemberSelection(), torch.randn(3, 4), torch.randn(3, 4)
    with selection.one_forward(repeats=False):
        once = selection.cast(x, HALF)
        assert selection.cast(x, HALF) is once
        assert torch.equal(selection.cast(other, HALF), other.to(HALF))
        assert torch.equal(selection.cast(x, HALF), once)
    assert selection.cast(x, HALF) is not selection.cast(x, HALF)


def test_an_input_that_was_changed_is_cast_again() -> None:
    selection, x = MemberSelection(), torch.randn(3, 4)
    with selection.one_forward(repeats=False):
        selection.cast(x, HALF)
        x.add_(1)
        assert torch.equal(selection.cast(x, HALF), x.to(HALF))


def test_another_precision_is_cast_from_the_input() -> None:
    selection, x = MemberSelection(), torch.randn(3, 4)
    with selection.one_forward(repeats=False):
        selection.cast(x, HALF)
        assert torch.equal(selection.cast(x, torch.float16), x.to(torch.float16))


def test_gradients_of_a_shared_cast_are_summed() -> None:
    selection, x = MemberSelection(), torch.randn(3, 4, requires_grad=True)
    with selection.one_forward(repeats=False):
        (selection.cast(x, HALF).sum() + 2 * selection.cast(x, HALF).sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
