"""Sizes of the kernels whose warps have roles, each with the reason for it."""

from __future__ import annotations

from dataclasses import dataclass

from .config import TileConfig, knows_triton

KEPT_BYTES = 1 << 30
"""Memory at most for the gradients of scores that backward keeps from dK and dV to dQ."""

KEPT_PROGRAMS = 256
"""Programs of dK and dV at least for which they are kept, if not for all of them at once.

Milliseconds of all of backward with and without, 32 heads on 8, head dimension 128. W = 4096 at
32768, 256 programs: 13.5 and 14.5. 131072 tokens with epochs of 4096, 240 programs: 30.8 and 31.1,
and a gibibyte more. The shared best 2048 of 32768, 128 programs: 4.37 and 4.29. All at once, W =
N / 2: 512 tokens 0.056 and 0.059, 1024 0.100 and 0.131, 2048 0.218 and 0.284; 8 heads on 2 there
0.096 and 0.119.

Small windows are not told apart, and the smallest lose; the walk of new slots, which does not end
before the epoch, may be why. 32768 tokens, with, and without at an earlier commit: W = 32 1.03 and
0.93, 64 1.09 and 0.94, 128 1.16 and 1.21, 256 1.33 and 1.67, 512 2.11 and 2.55, 1024 3.35 and 4.24,
2048 6.27 and 7.43.
"""


@dataclass(frozen=True)
class RoleConfig:
    """Sizes of one kernel.

    Attributes:
        block_m: Rows of a tile; in forward 64 for each of two consumers.
        block_n: Key slots of a block; in backward 64 for each of two consumers.
        buffers: Of what the consumers walk, in shared memory: blocks of keys, and of values, or
            tiles of queries, and of dO.
        registers: Of a thread at the start; the roles share out what 384 threads have then.
        consumer_registers: Of a thread of a consumer.
        producer_registers: Of a thread of the producer.
        rows_together: Rows of keys, (batch entry, KV head), whose tiles run at the same time; of
            forward.
    """

    block_m: int
    block_n: int
    buffers: int
    registers: int
    consumer_registers: int
    producer_registers: int
    rows_together: int = 1


@dataclass(frozen=True)
class Roles:
    """The kernels of one (architecture, head dimension).

    Attributes:
        forward: Output, `gluon_forward.py`.
        grad_key: dK and dV, `gluon_backward.py`.
        grad_query: dQ from what that keeps, `grad_product.py`.
    """

    forward: RoleConfig
    grad_key: RoleConfig
    grad_query: TileConfig


# Milliseconds, bf16, one H200, Triton 3.6, random scores, at (B, H, Hkv, N, W) = (1, 32, 8, 32768,
# 2048) unless N is given.
_ROLES = {
    ("sm_90", 128): Roles(
        # 2.10 instead of 2.62, 0.31 instead of 0.38 at N = 4096. Without turns at the tensor cores
        # 3 % slower, with blocks of 64 slots in 4 buffers 12 %.
        RoleConfig(128, 128, 2, 168, 240, 24, rows_together=8),
        # All of backward 6.84 instead of 7.92, 0.649 instead of 0.868 at N = 4096: by roles alone
        # 7.55, 0.822, by what is kept alone 7.77, 0.760. 2 buffers 6.90, 0.656, turns at the tensor
        # cores 6.88, 0.649, the old slots of all epochs first 7.10, 0.658, and with 4 buffers 7.03,
        # 0.655.
        RoleConfig(64, 128, 3, 168, 240, 24),
        # 1.23 of these 6.84, at 3.6 TB/s; 4 stages 1.32, 2 1.46, 256 rows 1.27, 64 rows 1.29.
        TileConfig(128, 64, 8, 3, uses_tma=True),
    )
}


def roles_for(architecture: str, head_dim: int) -> Roles | None:
    """The kernels by roles, or ``None`` where they cannot be used.

    They are written in Gluon, whose names and meanings are those of one version of Triton.
    """
    return _ROLES.get((architecture, head_dim)) if knows_triton() else None


def kept_units(units: int, blocks: int, nbytes: int) -> int:
    """How many (row of keys, epoch) backward keeps the gradients of scores of at a time.

    Args:
        units: How many there are.
        blocks: Blocks of slots of each, one for each program.
        nbytes: What one takes.

    Returns:
        Their number; 0 where it does not pay.
    """
    if nbytes > KEPT_BYTES:
        return 0
    steps = -(-units // (KEPT_BYTES // nbytes))
    at_once = -(-units // steps)
    return at_once if steps == 1 or at_once * blocks >= KEPT_PROGRAMS else 0
