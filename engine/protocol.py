"""What crosses the socket between the scheduler and the engine.

The engine knows slots, token ids and block ids: never requests, never tenants. KV bytes never leave it.
Every message is a frozen, tagged msgspec struct; frame 0 of each multipart message is the sender's epoch.
"""

from typing import Literal

import msgspec

Tier = Literal["device", "host", "disk"]


def slots_for(max_sequences: int, urgent_tokens: int) -> int:
    """How many slots there are. Those that are let go by steps which are not done yet cannot be used by an
    urgent one, and it should not have to wait for that: so where there are such there are twice as many."""
    return 2 * max_sequences if urgent_tokens else max_sequences


class Sampling(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How the next token of a sequence is drawn. The defaults change nothing; temperature 0 is greedy.

    The draw is a function of (`seed`, absolute position of the token), so it does not depend on the batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, the last `repetition_window` tokens of them (0: all)."""
    repetition_window: int = 0
    presence_penalty: float = 0.0
    """Over output only (what of it lies in the window, when there is one), as frequency_penalty."""
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """0 .. 2**63 - 1."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the sequence with finish "stop"; the model's own are among them unless ignore_eos."""
    min_tokens: int = 0
    """Stop tokens cannot be drawn before this many output tokens."""
    max_tokens: int = 0
    """Output tokens after which the sequence ends with finish "length"; >= 1."""
    logprobs: int = -1
    """-1: none; 0: of the drawn token; n: and of the n likeliest (<= 20). Of the raw distribution."""


# ---- scheduler -> engine


class Hello(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """First message after (re)connecting and once a second after; answered by Loading, Ready or Fault."""


class NewSeq(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters a slot. `tokens[:n_prompt]` is the prompt, the rest from before a preemption."""

    slot: int
    tokens: list[int]
    n_prompt: int
    computed: int
    """Leading tokens whose KV the first blocks hold already (a prefix hit): whole blocks, < len(tokens)."""
    sampling: Sampling
    state: int = -1
    """Where the state after `computed` tokens was kept (Go.keep), for a model with states; -1 where there is
    none, or nothing is computed."""


class Go(msgspec.Struct, frozen=True, array_like=True):
    """Compute the next `n_tokens` of a slot. When that reaches its last known token, one token is drawn.

    A slot that has finished by itself (stop token, max_tokens, error) ignores a Go that was planned before
    the scheduler could know.
    """

    slot: int
    n_tokens: int
    new_blocks: list[int]
    """Block ids appended to the slot's block table first (a prefix hit's blocks come with the first Go)."""
    keep: int = -1
    """Keep a copy of the state there (0 .. Ready.kept_states - 1), or -1. It replaces what was there once
    all states that `new` sequences of this step begin with have been read."""
    keep_at: int = 0
    """That copy is of the state after so many tokens of the sequence; they are reached by this Go."""


class Step(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One step, done in this order: `gone` leave, `new` enter, `go_on` are computed as one batch."""

    n: int
    gone: list[int]
    new: list[NewSeq]
    go_on: list[Go]
    urgent: bool = False
    """Done in the middle of the step in hand, or before or after it: it has no slot and no block in common
    with any step whose StepDone has not come, and Ready.urgent_tokens at most."""


class BlockName(msgspec.Struct, frozen=True, array_like=True):
    """What a block holds. The engine stores and compares it, and understands nothing of it."""

    key: bytes
    """[32] of the chain of digests up to the end of this block."""
    parent: bytes
    """[32] the key of the block before, or the root."""
    owner: bytes
    """[16] a digest of who may have it; blocks of one owner are counted together."""
    content: bytes
    """The token ids as u32le."""


class Move(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Copy one block between tiers, beside the steps; answered by one Moved.

    Until then the source keeps its bytes (its block is given to nobody else) and no step reads the target. A
    `source` or `target` on disk has no block number: its `name` says which it is.
    """

    id: int
    """Unique among moves that have not been answered."""
    source: Tier
    source_block: int = -1
    target: Tier
    target_block: int = -1
    name: BlockName | None = None
    """Set when one side is the disk: stored with the bytes, and compared with what is found there."""


class Moves(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Copies to be started, in this order of importance, and names to be forgotten on disk."""

    moves: list[Move]
    forget: list[bytes]


class Shutdown(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Finish the step in hand and exit."""


ToEngine = Hello | Step | Moves | Shutdown


# ---- engine -> scheduler


class Loading(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model is being loaded; `done` advances as long as it is alive."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The engine takes steps. Numbers that the scheduler plans with. Also sent unasked when loading ends."""

    pid: int
    blocks: int
    block_tokens: int
    block_bytes: int
    max_len: int
    """Longest sequence (prompt and output) in tokens."""
    max_sequences: int
    """Of a step; slots are 0 .. slots_for(max_sequences, urgent_tokens) - 1."""
    max_batch_tokens: int
    vocab: int
    isa: str
    steps: int
    """Steps done since start."""
    fingerprint: bytes
    """Digest of everything that changes KV bytes: weights, configuration, KV layout."""
    host_blocks: int = 0
    """Blocks of the host tier."""
    disk_bytes: int = 0
    """What the disk tier may hold; 0: there is none (or it has been given up)."""
    kept_states: int = -1
    """Places for copies of states; -1: the model's sequences have no state, their KV is all."""
    urgent_tokens: int = 0
    """That an urgent step may have; 0: a step is not interrupted."""


class StoredBlock(msgspec.Struct, frozen=True, array_like=True):
    """A block that the disk has (see BlockName), as it was found or stored."""

    key: bytes
    parent: bytes
    owner: bytes
    bytes: int
    """On disk, with its head and padding."""
    hits: int
    last_use: float
    """Seconds since the epoch."""


class Stored(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What the disk holds, in pieces after Ready: the last piece has `complete`."""

    blocks: list[StoredBlock]
    complete: bool


class Moved(msgspec.Struct, frozen=True, array_like=True):
    """A move has ended. When it is not `ok` the target holds nothing: a miss, never an error."""

    id: int
    ok: bool
    bytes: int
    seconds: float
    """Of the copy itself, without the wait before it."""


class MovesDone(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Moves that have ended, and names that the disk has lost or given up since (space, errors)."""

    moves: list[Moved]
    lost: list[bytes]


class SlotToken(msgspec.Struct, frozen=True, array_like=True):
    """What one slot drew."""

    slot: int
    token: int
    finish: str = ""
    """"" goes on; "stop", "length" or "error" (token is -1: the logits were not finite, or what the scheduler
    said of this sequence could not be done, which the engine's log explains)."""
    logprob: float = 0.0
    top: list[tuple[int, float]] = []


class StepDone(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Step `n` is done. Slots that did not reach their last token draw nothing and are not listed."""

    n: int
    tokens: list[SlotToken]
    seconds: float
    """Without those of urgent steps that were done in the middle of it."""
    computed: int
    """Tokens that were really computed."""


class Fault(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The engine refuses a message or cannot go on. n is the step, or -1."""

    n: int
    kind: str
    message: str


FromEngine = Loading | Ready | StepDone | Stored | MovesDone | Fault
