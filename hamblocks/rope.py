"""Rotary positions (RoFormer, arXiv 2104.09864), and how their frequencies are scaled.

The formulas are those of `ROPE_INIT_FUNCTIONS` in transformers, so that weights trained there keep
their meaning.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hamblocks.protocols import check_count
from hamblocks_ops.arguments import wrong
from hamblocks_ops.precision import wide

Scaling = dict[str, Any]
"""How frequencies are scaled, as `rope_scaling` in transformers: `rope_type`, `factor`, ..."""

LENGTH = "original_max_position_embeddings"

REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", LENGTH),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", LENGTH),
    "yarn": ("factor", LENGTH),
}
"""Kinds of scaling, and the numbers that each needs."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}


def check_theta(theta: Any) -> float | None:
    """Checks the base of the wavelengths; None: there are no rotary positions.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    if theta is None:
        return None
    is_number = isinstance(theta, numbers.Real) and not isinstance(theta, bool)
    if not is_number or not 0 < theta < math.inf:
        raise wrong("rope_theta", "None or a finite number > 0", repr(theta))
    return float(theta)


def check_scaling(scaling: object) -> Scaling | None:
    """Checks a scaling; None: frequencies are not scaled.

    Returns:
        A copy whose numbers are Python's own, so that a part's arguments can be saved as JSON.

    Raises:
        ValueError: an unknown `rope_type`, an unknown or missing entry, or one that is not > 0.
    """
    if scaling is None:
        return None
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if not isinstance(scaling, dict) or kind not in REQUIRED:
        expected = f'None, or an object with one of {", ".join(REQUIRED)} as "rope_type"'
        raise wrong("rope_scaling", expected, repr(scaling))
    required, optional = set(REQUIRED[kind]), set(OPTIONAL.get(kind, ()))
    given = set(scaling) - {"rope_type"}
    if not required <= given <= required | optional:
        listed = [*REQUIRED[kind], *(f"{name} (optional)" for name in OPTIONAL.get(kind, ()))]
        expected = f"{', '.join(listed)} beside rope_type {kind}"
        raise wrong("rope_scaling", expected, ", ".join(sorted(given)) or "none")
    plain = dict(scaling)
    for name in sorted(given - {"truncate"}):
        value = scaling[name]
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) > 0:
            raise wrong(f"rope_scaling: {name}", "a number > 0", repr(value))
        plain[name] = value if isinstance(value, int) else float(value)
    if LENGTH in scaling:
        plain[LENGTH] = check_count(f"rope_scaling: {LENGTH}", scaling[LENGTH], 1)
    return plain


def rotate(x: Tensor, position: Tensor, theta: float, scaling: Scaling | None = None) -> Tensor:
    """Rotary position embedding, with `rotate_half` of transformers.

    Args:
        x: `[B, T, H, D]`, D even.
        position: int `[B, T]`, or `[1, T]`.
        theta: base of the wavelengths.
        scaling: how the frequencies are scaled.

    Returns:
        Shape and dtype as x. Angles are computed in float32, or float64 for float64 x.
    """
    return turned(x, *angles(x, position, theta, scaling))


def angles(
    x: Tensor, position: Tensor, theta: float, scaling: Scaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, `[B, T, 1, D]`; arguments as in `rotate`.

    Both are multiplied by the attention factor of the scaling. The angle of a pair of channels
    appears twice: negated in the first half of D, as it is in the second. `turned` takes them so.
    """
    dtype = wide(x)
    frequency, factor = _both_ways(x.shape[-1], theta, scaling, position, dtype)
    angle = position.view(*position.shape, 1, 1).to(dtype) * frequency
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def pair_frequencies(
    x: Tensor, position: Tensor, theta: float, scaling: Scaling | None = None
) -> tuple[Tensor, float] | None:
    """The frequency of each pair of channels, `[D // 2]`, and the factor of cosine and sine.

    Frequencies are in radians per position. Returns None where they depend on the position
    ("dynamic"). Arguments as in `rotate`.
    """
    if (scaling or {}).get("rope_type") == "dynamic":
        return None
    table, factor = _both_ways(x.shape[-1], theta, scaling, position, wide(x))
    return table[x.shape[-1] // 2 :], factor


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[B, T, H, D]`, rotated by the result of `angles`; shape and dtype as x."""
    wider = x.to(cos.dtype)
    # the first half takes -sin times the second, and the second half sin times the first
    swapped = wider.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(wider * cos, swapped, sin).to(x.dtype)


def _both_ways(
    dim: int, theta: float, scaling: Scaling | None, position: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """`frequencies`, negative and then positive: `[D]`, or `[B, T, 1, D]`; and the factor."""
    if (scaling or {}).get("rope_type") == "dynamic":
        frequency, factor = frequencies(dim, theta, scaling, position, dtype)
        return torch.cat([-frequency, frequency], -1)[:, :, None], factor
    # Tables are kept, because decoding would compute the same one for every token. Not kept: one
    # made while a CUDA graph is captured, whose memory belongs to the graph, and one made while
    # tracing or for tensor subclasses, which must be part of what is traced.
    device = position.device
    if device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return _table(dim, theta, scaling, position, dtype)
    key = dim, theta, repr(scaling), dtype, device
    known = _TABLES.get(key)
    if known is None or type(position) is not Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _table(dim, theta, scaling, position, dtype)
        with torch.inference_mode(False), torch.no_grad():
            # made on the CPU: the copy to a GPU is complete when it returns, for all its streams
            host = torch.empty(0, device="cpu") if device.type == "cuda" else position
            table, factor = _table(dim, theta, scaling, host, dtype)
            known = table.to(device), factor
        # tables are never dropped: a CUDA graph may read one for as long as the graph exists
        if len(_TABLES) < MAX_TABLES and type(position) is Tensor and type(known[0]) is Tensor:
            _TABLES[key] = known
    return known


def _table(
    dim: int, theta: float, scaling: Scaling | None, position: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    frequency, factor = frequencies(dim, theta, scaling, position, dtype)
    return torch.cat([-frequency, frequency]), factor


MAX_TABLES = 64
"""Most tables that are kept; layers with the same head size and frequencies share one."""

_TABLES: dict[tuple[int, float, str, torch.dtype, torch.device], tuple[Tensor, float]] = {}
"""Results of `_both_ways`, by its arguments."""


def frequencies(
    dim: int, theta: float, scaling: Scaling | None, position: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """The frequency of every pair of channels, and the factor of cosine and sine.

    Args:
        dim: size of a head, D.
        theta: base of the wavelengths.
        scaling: how the frequencies are scaled.
        position: int `[B, T]`; its values are read by "dynamic" only.
        dtype: the dtype to compute with.

    Returns:
        `[D // 2]`, or `[B, T, D // 2]` where a token's frequencies depend on its position; and the
        factor.
    """
    exponent = torch.arange(0, dim, 2, device=position.device, dtype=dtype) / dim
    if scaling is None:
        return 1.0 / theta**exponent, 1.0
    if scaling["rope_type"] == "dynamic":
        return _dynamic(scaling, theta, exponent, position), 1.0
    kinds: dict[str, Callable[[Scaling, float, Tensor], Tensor]] = {
        "linear": _linear,
        "llama3": _llama3,
        "yarn": _yarn,
    }
    kind = scaling["rope_type"]
    return kinds[kind](scaling, theta, exponent), _attention_factor(scaling)


def _linear(scaling: Scaling, theta: float, exponent: Tensor) -> Tensor:
    """Position interpolation (arXiv 2306.15595): all positions are divided by the factor."""
    frequency: Tensor = 1.0 / theta**exponent / scaling["factor"]
    return frequency


def _dynamic(scaling: Scaling, theta: float, exponent: Tensor, position: Tensor) -> Tensor:
    """NTK scaling by length, `[B, T, D // 2]`.

    The base of a token grows with the number of tokens up to it, so that a token's key does not
    depend on later tokens. This is what transformers computes token by token. In one pass beyond
    the original length transformers takes the base of the last token for all.
    """
    factor, length, dim = scaling["factor"], scaling[LENGTH], 2 * len(exponent)
    seen = (position + 1).clamp(min=length).to(exponent.dtype)
    grown = (factor * seen / length - (factor - 1)) ** (dim / (dim - 2))
    frequency: Tensor = 1.0 / (theta * grown)[..., None] ** exponent
    return frequency


def _llama3(scaling: Scaling, theta: float, exponent: Tensor) -> Tensor:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, others interpolated."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factor, length = scaling["factor"], scaling[LENGTH]
    frequency = 1.0 / theta**exponent
    wavelength = 2 * math.pi / frequency
    part = (length / wavelength - low) / (high - low)
    between = (1 - part) * frequency / factor + part * frequency
    scaled = torch.where(wavelength > length / low, frequency / factor, between)
    return torch.where(wavelength < length / high, frequency, scaled)


def _yarn(scaling: Scaling, theta: float, exponent: Tensor) -> Tensor:
    """YaRN (arXiv 2309.00071): low frequencies are divided by the factor, high ones kept.

    In between it interpolates by the number of the channel.
    """
    length, half = scaling[LENGTH], len(exponent)

    def channel(turns: float) -> float:
        """The channel that makes this many turns over the original length."""
        return half * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    low = channel(scaling.get("beta_fast") or 32)
    high = channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001  # as transformers has it, against a division by 0
    index = torch.arange(half, device=exponent.device, dtype=exponent.dtype)
    kept = 1 - ((index - low) / (high - low)).clamp(0, 1)
    power = theta**exponent
    frequency: Tensor = 1.0 / (scaling["factor"] * power) * (1 - kept) + 1.0 / power * kept
    return frequency


def _attention_factor(scaling: Scaling) -> float:
    """The factor of cosine and sine. By default YaRN's is above 1, which sharpens the softmax."""
    if scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, mscale, every = (scaling.get(x) for x in ("factor", "mscale", "mscale_all_dim"))
    assert factor is not None

    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    return grown(mscale) / grown(every) if mscale and every else grown(1)
