"""Small networks with every kind of coupling, and the reference that surgery is compared with."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from idap import inputs
from idap.plan import ChannelStep, PruningPlan


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 24, 3, stride=2), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class Residual(nn.Module):
    """Identity and projection shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.bn_a, self.b = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 16, 1)
        self.c, self.d = nn.Conv2d(16, 20, 3, padding=1), nn.Conv2d(20, 24, 1)
        self.project = nn.Conv2d(16, 24, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.bn_a(self.a(x)))))
        x = F.relu(self.project(x) + self.d(F.relu(self.c(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.dw, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn1(self.expand(x)))
        x = F.hardswish(self.bn2(self.dw(x)))
        return self.head(self.project(x))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
        return self.out(x * scale)


class Dense(nn.Module):
    """Concatenations of concatenations, an input among them, and a pooling in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.grow1 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1)
        self.bn2, self.grow2 = nn.BatchNorm2d(20), nn.Conv2d(20, 12, 3, padding=1)
        self.bn3, self.out = nn.BatchNorm2d(35), nn.Conv2d(35, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.grow1(F.relu(self.bn1(a)))
        c = self.grow2(F.relu(self.bn2(torch.cat([a, b], 1))))
        return self.out(F.max_pool2d(F.relu(self.bn3(torch.cat((x, b, c, a), 1))), 2))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.fc1, self.fc2 = nn.Linear(12 * 4 * 4, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(torch.tanh(self.fc1(x.view(x.size(0), -1))))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 32, 3, padding=1, groups=4)
        self.conv3 = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Transposed(nn.Module):
    """A generator: a linear layer viewed as maps, then transposed convolutions, one of them depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 12 * 2 * 2)
        self.up1, self.bn = nn.ConvTranspose2d(12, 16, 4, 2, 1), nn.BatchNorm2d(16)
        self.dw = nn.ConvTranspose2d(16, 16, 2, 2, groups=16)
        self.up2 = nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.fc(z)).view(-1, 12, 2, 2)
        return torch.tanh(self.up2(self.dw(F.leaky_relu(self.bn(self.up1(x))))))


class TokenMLP(nn.Module):
    """(B, T, C) tokens with layer scale on the hidden width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.fc1, self.fc2 = nn.Linear(12, 40), nn.Linear(40, 12)
        self.gamma = nn.Parameter(torch.rand(40))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))) * self.gamma)
        return self.head(x.mean(1))


class Gated(nn.Module):
    """Both halves of one layer are multiplied: one unit is two of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(10, 48), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class ChannelsLast(nn.Module):
    """Permutations between convolutions and linear layers, as in ConvNeXt, without the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 16, 3), nn.Linear(16, 24), nn.Linear(24, 16)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.out(x + y)


class Norms(nn.Module):
    """Normalisations of every channel by itself: instance norm, group norm with a group a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.inorm = (
            nn.Conv2d(3, 16, 3),
            nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
        )
        self.conv2, self.gnorm = nn.Conv2d(16, 12, 3), nn.GroupNorm(12, 12)
        self.prelu = nn.PReLU(12)
        self.conv3 = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inorm(self.conv1(x)))
        return self.conv3(self.prelu(self.gnorm(self.conv2(x))))


def image(size: int = 8, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, 3, size, size)


SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "chain": (Chain, image()),
    "residual": (Residual, image()),
    "depthwise": (Depthwise, image()),
    "squeeze_excite": (SqueezeExcite, image()),
    "dense": (Dense, image()),
    "flatten": (Flatten, image()),
    "grouped": (Grouped, image()),
    "transposed": (Transposed, lambda: torch.randn(2, 6)),
    "token_mlp": (TokenMLP, lambda: torch.randn(2, 7, 12)),
    "gated": (Gated, lambda: torch.randn(2, 5, 10)),
    "channels_last": (ChannelsLast, image()),
    "norms": (Norms, image()),
}


def randomise(model: nn.Module, example: Any = None) -> nn.Module:
    """Float64 parameters and statistics that differ by channel and keep the size of the signals."""
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.dim() < 2:
                parameter.uniform_(0.6, 1.4)
            elif not parameter.abs().sum():
                parameter.normal_(0, 0.1)
            elif parameter.abs().max() < 1e-3:
                parameter.uniform_(0.6, 1.4)
        norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
        if isinstance(example, Tensor) and norms:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0
            model.train()(torch.randn(16, *example.shape[1:], dtype=torch.float64))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        for norm in norms:
            norm.running_mean += torch.randn_like(norm.running_mean) * norm.running_var.sqrt() * 0.2
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 1.5)
    return model


def scores_of(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(
            module.weight.shape[1 if getattr(module, "transposed", False) else 0], generator=generator
        )
        if getattr(module, "groups", 1) == 1
        else torch.rand(module.out_channels, generator=generator)
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    }


def zeroed_outputs(model: nn.Module, plan: PruningPlan, example: Any) -> list[Tensor]:
    """What the full-width model gives when hooks set the removed channels to zero where layers read them."""
    reference = copy.deepcopy(model).eval()
    (step,) = plan.steps
    assert isinstance(step, ChannelStep)
    touched = 0
    for removal in step.removals:
        if removal.kind not in ("conv_in", "linear_in", "layernorm", "groupnorm"):
            continue
        module = reference.get_submodule(removal.layer)
        keep = torch.ones(removal.size, dtype=torch.float64)
        keep[list(removal.removed)] = 0
        if removal.kind in ("layernorm", "groupnorm"):
            module.register_forward_hook(lambda m, args, _, keep=keep: norm_over_kept(m, args[0], keep))
            continue
        if removal.kind == "conv_in":
            keep = keep.view(1, -1, *[1] * len(module.kernel_size))
        module.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep, *args[1:]))
        touched += 1
    assert touched, "nothing reads a removed channel"
    with torch.no_grad():
        return [tensor for _, tensor in inputs.outputs_of(inputs.call(reference, example))]


def norm_over_kept(norm: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """LayerNorm or GroupNorm from weighted sums, where the weights of removed channels are zero."""
    grouped = isinstance(norm, nn.GroupNorm)
    last = not grouped and (type(norm) is nn.LayerNorm or x.shape[1] != len(keep))
    shape = [-1] if last else [-1, *[1] * (x.dim() - 2)]
    parts = norm.num_groups if grouped else 1
    out = torch.zeros_like(x)
    for part in torch.arange(len(keep)).chunk(parts):
        own = torch.zeros_like(keep)
        own[part] = keep[part]
        mask = own.view(shape)
        dims = list(range(1, x.dim())) if grouped else [-1] if last else [1]
        count = (mask * torch.ones_like(x)).sum(dims, keepdim=True).clamp_min(1)
        mean = (mask * x).sum(dims, keepdim=True) / count
        var = (mask * (x - mean).square()).sum(dims, keepdim=True) / count
        y = (x - mean) / (var + norm.eps).sqrt()
        if norm.weight is not None:
            y = y * norm.weight.view(shape) + norm.bias.view(shape)
        out = out + mask * y
    return out


def relative_error(wanted: list[Tensor], got: list[Tensor]) -> float:
    assert [t.shape for t in wanted] == [t.shape for t in got]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, got, strict=True))


# ------------------------------------------------------------------------------------ attention


class Separate(nn.Module):
    """Queries, keys and values from layers of their own; numbers of heads and widths kept as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.head_dim, self.all_head_size, self.embed_dim = 4, 6, 24, 24
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.out = nn.Linear(24, 24)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_attention_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        weights = torch.softmax(q @ k.transpose(-2, -1) / self.head_dim**0.5, dim=-1)
        y = (weights @ v).permute(0, 2, 1, 3).contiguous()
        return self.out(y.view(*y.shape[:2], self.all_head_size))


class GroupedQuery(nn.Module):
    """Six query heads share three heads of keys and values, repeated by hand or by the fused attention."""

    def __init__(self, repeat: bool = True) -> None:
        super().__init__()
        self.repeat, self.head_dim, self.groups = repeat, 4, 2
        self.num_heads, self.num_key_value_heads = 6, 3
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 12)
        self.o_proj = nn.Linear(24, 24, bias=False)

    def repeated(self, x: Tensor) -> Tensor:
        b, h, t, d = x.shape
        return x[:, :, None].expand(b, h, self.groups, t, d).reshape(b, h * self.groups, t, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        if self.repeat:
            y = F.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v), is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """One layer for queries, keys and values, in one of the layouts in use."""

    def __init__(self, heads: int = 4, layout: str = "three", attend: str = "fused") -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, 24 // heads
        self.layout, self.attend = layout, attend
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h, d = self.num_heads, self.head_dim
        fused = self.qkv(x)
        if self.layout == "three":
            q, k, v = fused.reshape(b, t, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "picked":
            parts = fused.view(b, t, 3, h, d).permute(2, 0, 3, 1, 4)
            q, k, v = parts[0], parts[1], parts[2]
        elif self.layout == "chunks":
            q, k, v = (part.view(b, t, h, d).transpose(1, 2) for part in fused.chunk(3, dim=-1))
        else:  # every head has its own three
            q, k, v = fused.view(b, t, h, 3 * d).transpose(1, 2).chunk(3, dim=-1)
        if self.attend == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.attend == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(d**-0.5).softmax(-1)
            y = torch.einsum("bhij,bhjd->bhid", weights, v)
        else:
            y = (q * d**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, t, h * d))


class Attending(nn.Module):
    """An attention in a residual block, and an output."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn, self.head = nn.LayerNorm(24), attn, nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attn(self.norm(x)))


def _attending(kind: type[nn.Module], **options: Any) -> Callable[..., nn.Module]:
    return lambda **more: Attending(kind(**options, **more))


# Factory, and the sizes of the groups of heads by their first layer.
ATTENTION: dict[str, tuple[Callable[..., nn.Module], dict[str, int]]] = {
    "separate": (_attending(Separate), {"attn.query": 4}),
    "grouped": (_attending(GroupedQuery), {"attn.q_proj": 3}),
    "grouped_fused": (_attending(GroupedQuery, repeat=False), {"attn.q_proj": 3}),
    "fused": (_attending(Fused), {"attn.qkv": 4}),
    "fused_manual": (_attending(Fused, attend="manual"), {"attn.qkv": 4}),
    "fused_einsum": (_attending(Fused, attend="einsum"), {"attn.qkv": 4}),
    "picked": (_attending(Fused, layout="picked", attend="manual"), {"attn.qkv": 4}),
    "chunks": (_attending(Fused, layout="chunks"), {"attn.qkv": 4}),
    "own_three": (_attending(Fused, layout="own", attend="manual"), {"attn.qkv": 4}),
}


class AttentionBlock(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(24), attn, nn.LayerNorm(24)
        self.fc1, self.fc2 = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class SmallViT(nn.Module):
    """Patches, a class token, positions, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 24)), nn.Parameter(torch.randn(1, 17, 24))
        self.blocks = nn.ModuleList(AttentionBlock(Fused()) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Gpt(nn.Module):
    """Causal blocks with shared keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AttentionBlock(GroupedQuery(repeat)) for repeat in (True, False))
        self.head = nn.Linear(24, 11)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def default_sigint() -> None:
    """For a process that is to be interrupted: a test run in the background of a script ignores Ctrl-C itself."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(*arguments: str, timeout: float) -> tuple[int, str]:
    """Exit code and error output of ``idap`` given a real Ctrl-C when it has measured the base network.

    Args:
        timeout: seconds it may take from then on.
    """
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "idap", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_sigint,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("base"):
                process.send_signal(signal.SIGINT)
                break
        _, error = process.communicate(timeout=timeout)
    return process.returncode, error
