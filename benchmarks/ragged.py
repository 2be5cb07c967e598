"""Which way to multiply each row by its member's adapter is fastest, if members have unequal numbers of rows, or few?

    python benchmarks/ragged.py [--rows 16] [--tokens 64 256] [--members 8] [--dtypes bfloat16 float32] [--gpu]

A routed step has P rows of T tokens, a third of them one member's. Forward and backward of the low-rank update alone,
r = 16, in a layer of 576 by 1,536 (4,096 by 14,336 with --gpu):

    gathered      each row with a copy of its member's matrices, one `bmm` (what we do)
    grouped       `torch.nn.functional.grouped_mm` over rows sorted by member
    padded        each member's rows padded to the most that any has, one `bmm`
    loop          member after member

In decoding each member has few rows, all equally many. The second table has updates of a half-precision layer of 576
features and back, without gradients, by adapters in its precision and in float32.

Medians of rounds in turns, of 30 updates each.
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from joint_step import measure, precisions
from torch import Tensor

RANK, UPDATES = 16, 30


def ways(x_PTI: Tensor, member_P: Tensor, A_MRI: Tensor, B_MOR: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Updates [P, T, O] of rows that are sorted by member."""
    counts = member_P.bincount(minlength=len(A_MRI))
    tokens, rows_of = x_PTI.shape[1], counts.tolist()
    ends = (counts * tokens).cumsum(0).to(torch.int32)
    place_P = torch.cat([torch.arange(n, device=counts.device) for n in rows_of])

    def gathered() -> Tensor:
        return torch.bmm(torch.bmm(x_PTI, A_MRI[member_P].transpose(1, 2)), B_MOR[member_P].transpose(1, 2))

    def grouped() -> Tensor:
        low = F.grouped_mm(x_PTI.flatten(0, 1), A_MRI.transpose(1, 2), offs=ends)
        return F.grouped_mm(low, B_MOR.transpose(1, 2), offs=ends).unflatten(0, x_PTI.shape[:2])

    def padded() -> Tensor:
        wide = x_PTI.new_zeros(len(A_MRI), max(rows_of), *x_PTI.shape[1:])
        wide = wide.index_put((member_P, place_P), x_PTI)
        low = torch.bmm(wide.flatten(1, 2), A_MRI.transpose(1, 2))
        return torch.bmm(low, B_MOR.transpose(1, 2)).unflatten(1, (-1, tokens))[member_P, place_P]

    def loop() -> Tensor:
        parts = zip(x_PTI.split(rows_of), A_MRI, B_MOR, strict=True)
        return torch.cat([part @ A_RI.T @ B_OR.T for part, A_RI, B_OR in parts])

    return {"gathered": gathered, "grouped": grouped, "padded": padded, "loop": loop}


def few(rows: int, members: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Updates of a layer's output [M, N, O] in bfloat16, by adapters in either precision."""
    x_MNI, result_MNO = torch.randn(2, members, rows, 576, device=device).bfloat16()
    A_MRI, B_MRO = torch.randn(members, RANK, 576, device=device), torch.randn(members, RANK, 576, device=device)
    half_A, half_B = A_MRI.bfloat16(), B_MRO.bfloat16()

    def in_half() -> Tensor:
        return torch.baddbmm(result_MNO, torch.bmm(x_MNI, half_A.transpose(1, 2)), half_B)

    def in_float32() -> Tensor:
        low_MNR = torch.bmm(x_MNI.float(), A_MRI.transpose(1, 2))
        return torch.baddbmm(result_MNO.float(), low_MNR, B_MRO).bfloat16()

    return {"bfloat16": in_half, "float32": in_float32}


def backward(run: Callable[[], Tensor], upstream: Tensor) -> None:
    run().backward(upstream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    device, (features, outputs) = ("cuda", (4096, 14_336)) if args.gpu else ("cpu", (576, 1536))
    where = torch.cuda.get_device_name() if args.gpu else platform.processor() or "CPU"
    print(
        f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads; {args.rows} rows, M = {args.members}"
    )
    print("dtype     tokens  ms an update, forward and backward")
    found = []
    for dtype in args.dtypes or precisions(device):
        for tokens in args.tokens:
            torch.manual_seed(0)
            given = {"device": device, "dtype": getattr(torch, dtype)}
            x = torch.randn(args.rows, tokens, features, **given).requires_grad_()
            A, B = (
                torch.randn(args.members, *shape, **given).mul_(0.1).requires_grad_()
                for shape in ((RANK, features), (outputs, RANK))
            )
            favourite = args.rows // 3
            others = torch.randint(args.members, (args.rows - favourite,))
            member = torch.cat([torch.zeros(favourite, dtype=torch.long), others]).sort().values.to(device)
            made = ways(x, member, A, B)
            upstream = torch.randn(args.rows, tokens, outputs, **given)
            for name, run in made.items():
                assert torch.allclose(run().float(), made["loop"]().float(), rtol=0.05, atol=0.5), name
            trained = {name: partial(backward, run, upstream) for name, run in made.items()}
            row = {name: 1e3 * s for name, s in measure(trained, args.rounds, device, UPDATES).items()}
            print(f"{dtype:9} {tokens:6}  " + "   ".join(f"{n} {ms:.2f}" for n, ms in row.items()), flush=True)
            found.append({"dtype": dtype, "tokens": tokens, **row})
    print("\nmembers  rows of each  µs an update, no gradients")
    for members in (1, 3, 8):
        for rows in (1, 2, 4, 8, 16):
            with torch.no_grad():
                times = measure(few(rows, members, device), args.rounds, device, UPDATES)
            print(f"{members:7} {rows:13}  " + "   ".join(f"{n} {1e6 * s:.0f}" for n, s in times.items()), flush=True)
            found.append({"members": members, "rows": rows, "seconds": times})
    print(json.dumps({"benchmark": "ragged", "rows": found}))


if __name__ == "__main__":
    main()
