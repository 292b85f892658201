"""Every shape of work of every CUDA kernel once, small: what compute-sanitizer is run on."""

from __future__ import annotations

import torch

from idap_kernels import bn_act_stats, channel_stats, filter_norms, pair_stats

MAPS: list[tuple[tuple[int, ...], int]] = [
    ((5, 37, 7, 7), 1),  # rows
    ((3, 21, 14, 14), 1),
    ((70, 64, 6, 6), 1),  # several samples a block
    ((2, 3, 96, 96), 1),  # pieces of rows
    ((1, 2, 40000), 1),
    ((3, 300, 40), 2),  # columns
    ((1, 18000, 30), 2),  # columns, two levels of records
    ((33, 300), 1),  # a thread a row
]


def main() -> None:
    torch.manual_seed(0)
    worst = 0.0
    for shape, channel_dim in MAPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.randn(shape, dtype=torch.float64).to(dtype)
            for activation in ("relu", "gelu"):
                stats = None
                for _ in range(2):
                    stats = channel_stats(
                        x.cuda(), channel_dim=channel_dim, activation=activation, out=stats, backend="cuda"
                    )
                twice = torch.cat([x, x])
                exact = channel_stats(
                    twice, channel_dim=channel_dim, activation=activation, backend="reference"
                ).state
                assert stats is not None
                error = (stats.state.cpu() - exact).abs() / exact.abs().amax(dim=1, keepdim=True).clamp_min(1)
                worst = max(worst, error.max().item())
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            x = torch.randn(shape, dtype=torch.float64).to(dtype)
            norm = torch.randn(4, shape[channel_dim])
            norm[1] = norm[1].square() + 0.1
            for act in ("relu", "hardswish"):
                (y, ours), (exact_y, wanted) = (
                    bn_act_stats(
                        x.to(device), *norm.to(device), act=act, channel_dim=channel_dim, backend=backend
                    )
                    for device, backend in (("cuda", "cuda"), ("cpu", "reference"))
                )
                error = (y.cpu().double() - exact_y.double()).abs() / (1 + exact_y.double().abs())
                worst = max(worst, error.max().item() - torch.finfo(dtype).eps)
                error = (ours.state.cpu() - wanted.state).abs()
                scale = wanted.state.abs().amax(dim=1, keepdim=True).clamp_min(1)
                worst = max(worst, (error / scale).max().item())
    for shape, per in (((3, 5, 9, 7), "sample"), ((2, 60000), "sample"), ((3, 5, 64), "token")):
        x, y = torch.randn(2, *shape)
        got = pair_stats(x.cuda(), y.cuda(), per=per, backend="cuda").state.cpu()
        exact = pair_stats(x, y, per=per, backend="reference").state
        worst = max(worst, ((got - exact).abs() / exact[0]).max().item())
    weights = [
        torch.randn(5, 3, 3, 3),
        torch.randn(2, 20000),
        torch.randn(3, 4099),
        torch.randn(17, 32).half(),
    ]
    norms = filter_norms([w.cuda() for w in weights], backend="cuda")
    for a, b in zip(norms, filter_norms(weights, backend="reference")):
        worst = max(worst, ((a.cpu() - b).abs() / b).max().item())
    print(f"largest error, as a share of its scale: {worst:.1e}")
    if not worst < 1e-4:
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()
